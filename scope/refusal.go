package scope

import (
	"strings"
	"time"
)

// Rule is the stable name of what refused. The names of limits are rules; the
// others are listed here. docs/scope.md has a sentence for each.
type Rule string

// The rules, in the order in which Check applies them.
const (
	RuleForm              Rule = "form" // the action is not well-formed; from ParseAction
	RuleNotBefore         Rule = "not_before"
	RuleNotAfter          Rule = "not_after"
	RuleAttestationAge    Rule = "max_attestation_age_s"
	RuleOS                Rule = "os"       // the process was not started under the scope's os section
	RuleStart             Rule = "os_start" // what was started is not in os.start
	RuleVenues            Rule = "allowed_venues"
	RuleActions           Rule = "allowed_actions"
	RuleTradingWindow     Rule = "trading_window"
	RuleAccounts          Rule = "allowed_accounts"
	RuleClients           Rule = "allowed_clients"
	RuleInstruments       Rule = "allowed_instruments"
	RuleSides             Rule = "allowed_sides"
	RuleShort             Rule = "allow_short"
	RuleOrdTypes          Rule = "allowed_ord_types"
	RuleTIF               Rule = "allowed_tif"
	RuleOrderQty          Rule = "max_order_qty"
	RuleNotionalUndefined Rule = "notional_undefined" // no price from which to compute it
	RuleNotionalOverflow  Rule = "notional_overflow"
	RuleOrderNotional     Rule = "max_order_notional"
	RuleReferenceMissing  Rule = "reference_missing"
	RuleReferenceStale    Rule = "reference_stale"
	RuleCollar            Rule = "price_collar_bps"

	// Where a request comes from: see CheckSource.
	RuleSourceNetwork Rule = "source_network"
	RuleSourceRegion  Rule = "source_region"

	RuleCertificateExpired Rule = "certificate_expired" // of the signer: the action is after the certificate's end

	// Limits over time, which the record holds: see Book.
	RuleDuplicate       Rule = "duplicate_window_ms"
	RuleNotionalWindow  Rule = "max_notional_per_window"
	RuleQtyWindow       Rule = "max_qty_per_window"
	RuleOrdersWindow    Rule = "max_orders_per_window"
	RuleMessagesWindow  Rule = "max_messages_per_window"
	RuleCollarWindow    Rule = "price_collar_window_bps"
	RuleInstrumentCount Rule = "max_instruments"
	RuleVenueCount      Rule = "max_venues"
	RuleOpenOrders      Rule = "max_open_orders"
	RuleOpenNotional    Rule = "max_open_notional"
	RuleDisabled        Rule = "disabled"                  // by the throttle, before
	RuleThrottle        Rule = "repeat_execution_throttle" // which disables
)

// Refusal says which rule refuses an action, and by how much. Only Rule and
// Message are always set. It is an error.
type Refusal struct {
	Rule    Rule   `json:"rule"`
	Field   string `json:"field,omitempty"`  // the action's member, such as ord.Price
	Value   string `json:"value,omitempty"`  // what the action has or leads to
	Limit   string `json:"limit,omitempty"`  // what the scope allows
	Excess  string `json:"excess,omitempty"` // by how much the value passes the limit
	Message string `json:"message"`          // one sentence for a person

	// Limits over time:
	Key   string `json:"key,omitempty"`   // what the limit is for: a currency, an instrument, a venue or an algorithm
	Used  string `json:"used,omitempty"`  // before the action
	Left  string `json:"left,omitempty"`  // what may still be used
	Block Block  `json:"block,omitempty"` // of any limit: soft if a second person can lift it for one order

	FreeAt time.Time `json:"free_at,omitzero"` // before then it is refused again; zero: no time frees it

	// Cause is what went wrong inside whoever refuses, such as an error of a device. It is
	// for its log alone: neither Error nor JSON has it.
	Cause error `json:"-"`
}

// Unwrap returns the cause.
func (r *Refusal) Unwrap() error { return r.Cause }

// Error returns the rule and the sentence in one line.
func (r *Refusal) Error() string {
	var b strings.Builder
	b.WriteString(string(r.Rule))
	b.WriteString(": ")
	b.WriteString(r.Message)
	return b.String()
}

// of says whether the limit that refuses can be lifted.
func (r *Refusal) of(b Block) *Refusal {
	r.Block = b
	return r
}

// Is makes errors.Is(err, &Refusal{Rule: r}) ask for the rule.
func (r *Refusal) Is(target error) bool {
	t, ok := target.(*Refusal)
	return ok && t.Rule == r.Rule
}
