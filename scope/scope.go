package scope

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"inkan/internal/strictjson"
)

// MaxScope bounds a scope's text, in bytes. It must fit into a certificate.
const MaxScope = 8 << 10

// maxEntries bounds each list of a scope.
const maxEntries = 256

// Scope is what an agent may do. Make one with [Parse], [ParseYAML] or
// [ParseCanonical]; the zero value and nil allow nothing. A Scope is immutable
// and safe for concurrent use.
type Scope struct {
	doc       document
	canonical []byte
	hash      [32]byte

	// What Check looks at, made once.
	instruments map[string]Decimal // contract multiplier
	ids         map[string]string  // their names, each under itself
	notional    map[string]*MoneyLimit
	qty         map[string]*QtyLimit
	trading     *week // nil: at any time
	limits      []limit
}

// document is the JSON form. Members are in the order of docs/scope.md.
type document struct {
	Version int `json:"version"` // 1

	// Grants: what is not listed is refused.
	Actions     []Kind       `json:"allowed_actions"`
	Venues      []string     `json:"allowed_venues"`
	Instruments []Instrument `json:"allowed_instruments,omitempty"`
	Sides       []string     `json:"allowed_sides,omitempty"`
	Short       bool         `json:"allow_short,omitzero"`
	OrdTypes    []string     `json:"allowed_ord_types,omitempty"`
	TIF         []string     `json:"allowed_tif,omitempty"`
	Accounts    []string     `json:"allowed_accounts,omitempty"`
	Clients     []string     `json:"allowed_clients,omitempty"`

	// Where the agent's TLS key may be used.
	Destinations []Destination `json:"destinations,omitempty"`

	// Limits: they bound what is granted.
	OrderNotional []MoneyLimit `json:"max_order_notional,omitempty"`
	OrderQty      []QtyLimit   `json:"max_order_qty,omitempty"`
	Collar        *Collar      `json:"price_collar_bps,omitempty"`
	Approval      []Threshold  `json:"human_approval_above,omitempty"`

	// Limits over time, which only who has the record can check: see Book.
	NotionalWindows  []NotionalWindow `json:"max_notional_per_window,omitempty"`
	QtyWindows       []QtyWindow      `json:"max_qty_per_window,omitempty"`
	OrderWindows     []CountWindow    `json:"max_orders_per_window,omitempty"`
	MessageWindows   []MessageWindow  `json:"max_messages_per_window,omitempty"`
	DuplicateMS      uint32           `json:"duplicate_window_ms,omitzero"`
	CollarWindows    []CollarWindow   `json:"price_collar_window_bps,omitempty"`
	InstrumentCounts []CountWindow    `json:"max_instruments,omitempty"`
	VenueCounts      []CountWindow    `json:"max_venues,omitempty"`
	OpenOrders       *OpenOrders      `json:"max_open_orders,omitempty"`
	OpenNotional     []MoneyLimit     `json:"max_open_notional,omitempty"`
	Throttles        []Throttle       `json:"repeat_execution_throttle,omitempty"`

	Trading      []Hours    `json:"trading_window,omitempty"`
	NotBefore    *time.Time `json:"not_before,omitempty"`
	NotAfter     *time.Time `json:"not_after,omitempty"`
	AttestationS uint32     `json:"max_attestation_age_s,omitzero"`

	ClockDivergence uint32 `json:"max_clock_divergence_us,omitzero"` // of the signer's clock from UTC

	// Where its requests may come from: see CheckSource.
	Networks []netip.Prefix `json:"source_networks,omitempty"`
	Regions  []string       `json:"source_regions,omitempty"`

	// What the operating system lets the agent's process do: see OS.
	OS *OS `json:"os,omitempty"`

	// Who may lift, approve, narrow and re-arm.
	Controllers []Controller `json:"controllers,omitempty"`
}

// Instrument is one instrument that may be traded.
type Instrument struct {
	ID         string   `json:"id"`                   // isin:, dti: or symbol: and the identifier
	Multiplier *Decimal `json:"multiplier,omitempty"` // contract multiplier; 1 when absent
}

// Block says whether a limit can be lifted for one order by a second person.
type Block string

// A limit blocks hard unless it says soft.
const (
	Hard Block = ""
	Soft Block = "soft"
)

// MoneyLimit bounds an amount in one currency, inclusively.
type MoneyLimit struct {
	Currency string  `json:"currency"`
	Amount   Decimal `json:"amount"`
	Block    Block   `json:"block,omitempty"`
}

// QtyLimit bounds a quantity of one instrument, inclusively; instrument * is
// for all instruments that have no entry of their own.
type QtyLimit struct {
	Instrument string  `json:"instrument"`
	Qty        Decimal `json:"qty"`
	Block      Block   `json:"block,omitempty"`
}

// Collar bounds an order's price around a reference price.
type Collar struct {
	BPS      uint32 `json:"bps"`        // each side, in 1/10000 of the reference
	Source   string `json:"source"`     // who states the reference
	MaxAgeMS uint32 `json:"max_age_ms"` // of the reference at the time of the order
	Block    Block  `json:"block,omitempty"`
}

// Hours is a daily interval in UTC, from inclusive, to exclusive, minutes exact.
type Hours struct {
	Days []string `json:"days"` // mon ... sun
	From string   `json:"from"` // 00:00 to 23:59
	To   string   `json:"to"`   // 00:01 to 24:00, later than From
}

// ReferencePrice is a price that a source other than the agent states.
type ReferencePrice struct {
	Instrument string    `json:"instrument"`
	Price      Decimal   `json:"price"`
	Currency   string    `json:"currency"`
	Source     string    `json:"source"`
	Time       time.Time `json:"time"`
}

// Parse reads a scope in JSON, strictly. The order of lists and white space do
// not matter; everything else has one spelling.
func Parse(b []byte) (*Scope, error) {
	var d document
	if err := strictjson.Unmarshal(b, MaxScope, &d); err != nil {
		return nil, fmt.Errorf("scope: %w", err)
	}
	return compile(d)
}

// ParseYAML reads a scope in YAML by the rules of [Parse]. Decimals are quoted.
func ParseYAML(b []byte) (*Scope, error) {
	var d document
	if err := strictjson.UnmarshalYAML(b, MaxScope, &d); err != nil {
		return nil, fmt.Errorf("scope: %w", err)
	}
	return compile(d)
}

// BoundsAttestation says whether the scope bounds the age of the evidence
// behind the certificate: then there must be some.
func (s *Scope) BoundsAttestation() bool { return s.doc.AttestationS != 0 }

// ReferenceSource is who states the prices that the collar is around; empty where
// there is no collar.
func (s *Scope) ReferenceSource() string {
	if s.doc.Collar == nil {
		return ""
	}
	return s.doc.Collar.Source
}

// ParseCanonical reads a scope and refuses every spelling but the canonical
// one. It is for scopes in certificates.
func ParseCanonical(b []byte) (*Scope, error) {
	s, err := Parse(b)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(b, s.canonical) {
		return nil, errors.New("scope: is not in canonical form: write it with inkan scope canonical")
	}
	return s, nil
}

// Venues returns the venues that may be traded at; empty: they are not limited.
func (s *Scope) Venues() []string { return slices.Clone(s.doc.Venues) }

// Canonical returns the scope's one spelling: RFC 8785 JSON with sorted lists.
// Callers must not change it.
func (s *Scope) Canonical() []byte { return s.canonical }

// Hash returns the SHA-256 of the canonical form.
func (s *Scope) Hash() [32]byte { return s.hash }

func compile(d document) (*Scope, error) {
	if err := d.validate(); err != nil {
		return nil, fmt.Errorf("scope: %w", err)
	}
	s := &Scope{
		instruments: make(map[string]Decimal),
		ids:         make(map[string]string),
		notional:    make(map[string]*MoneyLimit),
		qty:         make(map[string]*QtyLimit),
	}
	one := Decimal{scaled: unit}
	for i, in := range d.Instruments {
		s.ids[in.ID] = in.ID
		if in.Multiplier == nil {
			s.instruments[in.ID] = one
			continue
		}
		s.instruments[in.ID] = *in.Multiplier
		if *in.Multiplier == one {
			d.Instruments[i].Multiplier = nil // 1 has one spelling: absent
		}
	}
	for i := range d.OrderNotional {
		s.notional[d.OrderNotional[i].Currency] = &d.OrderNotional[i]
	}
	for i := range d.OrderQty {
		s.qty[d.OrderQty[i].Instrument] = &d.OrderQty[i]
	}
	if len(d.Trading) > 0 {
		s.trading = new(week)
		for _, h := range d.Trading {
			s.trading.add(h)
		}
	}
	s.doc = d
	s.limits = d.limits()
	var err error
	if s.canonical, err = strictjson.Marshal(&d); err != nil {
		return nil, fmt.Errorf("scope: %w", err)
	}
	if len(s.canonical) > MaxScope {
		return nil, fmt.Errorf("scope: canonical form has %d bytes, at most %d are allowed", len(s.canonical), MaxScope)
	}
	s.hash = sha256.Sum256(s.canonical)
	return s, nil
}

// validate checks every member and sorts the lists.
func (d *document) validate() error {
	if d.Version != 1 {
		return fmt.Errorf("version is %d, this program knows 1", d.Version)
	}
	for _, k := range d.Actions {
		if !slices.Contains(Kinds, k) {
			return fmt.Errorf("allowed_actions: %s is not a kind of action; the kinds are %s", clipped(string(k)), join(Kinds))
		}
	}
	if err := errors.Join(
		set("allowed_actions", d.Actions, func(Kind) bool { return true }, "a kind of action"),
		set("allowed_venues", d.Venues, validVenue, "a MIC such as XPAR, or lei: and an LEI"),
		set("allowed_sides", d.Sides, oneOf(sides), "one of "+join(sides)),
		set("allowed_ord_types", d.OrdTypes, oneOf(ordTypes), "one of "+join(ordTypes)),
		set("allowed_tif", d.TIF, oneOf(tifs), "one of "+join(tifs)),
		set("allowed_accounts", d.Accounts, validText, "printable ASCII without spaces"),
		set("allowed_clients", d.Clients, validText, "printable ASCII without spaces"),
		validateDestinations(d.Destinations),
	); err != nil {
		return err
	}
	if len(d.Actions) == 0 || len(d.Venues) == 0 {
		return errors.New("allowed_actions and allowed_venues must not be empty: a scope without them allows nothing")
	}
	if err := d.validateGrants(); err != nil {
		return err
	}
	return d.validateLimits()
}

// trades says whether an order or a quote is granted.
func (d *document) trades() bool {
	return slices.Contains(d.Actions, OrderNew) || slices.Contains(d.Actions, OrderReplace) || slices.Contains(d.Actions, QuoteNew)
}

func (d *document) pays() bool {
	return slices.Contains(d.Actions, Transfer) || slices.Contains(d.Actions, Withdraw)
}

func (d *document) validateGrants() error {
	if len(d.Instruments) > maxEntries {
		return fmt.Errorf("allowed_instruments: %d entries, at most %d are allowed", len(d.Instruments), maxEntries)
	}
	slices.SortFunc(d.Instruments, func(a, b Instrument) int { return strings.Compare(a.ID, b.ID) })
	for i, in := range d.Instruments {
		switch {
		case !validInstrument(in.ID):
			return fmt.Errorf("allowed_instruments: %s is not an instrument: write isin:FR0000120271, dti: or symbol: and the identifier", clipped(in.ID))
		case i > 0 && d.Instruments[i-1].ID == in.ID:
			return fmt.Errorf("allowed_instruments: %s stands twice", in.ID)
		case in.Multiplier != nil && in.Multiplier.Sign() <= 0:
			return fmt.Errorf("allowed_instruments: multiplier of %s is not positive", in.ID)
		}
	}
	if d.trades() {
		for _, need := range []struct {
			name  string
			empty bool
		}{
			{"allowed_instruments", len(d.Instruments) == 0}, {"allowed_tif", len(d.TIF) == 0},
			{"max_order_notional", len(d.OrderNotional) == 0},
		} {
			if need.empty {
				return fmt.Errorf("%s is missing: orders and quotes need it", need.name)
			}
		}
	}
	if d.pays() && len(d.OrderNotional) == 0 {
		return errors.New("max_order_notional is missing: payments need it")
	}
	if d.Short && !slices.Contains(d.Sides, "5") && !slices.Contains(d.Sides, "6") {
		return errors.New("allow_short is true, but allowed_sides has neither 5 nor 6")
	}
	return nil
}

func (d *document) validateLimits() error {
	if len(d.OrderNotional) > maxEntries || len(d.OrderQty) > maxEntries || len(d.Trading) > maxEntries {
		return fmt.Errorf("a limit has more than %d entries", maxEntries)
	}
	slices.SortFunc(d.OrderNotional, func(a, b MoneyLimit) int { return strings.Compare(a.Currency, b.Currency) })
	for i := range d.OrderNotional {
		m := &d.OrderNotional[i]
		switch {
		case !validCurrency(m.Currency):
			return fmt.Errorf("max_order_notional: currency %s: an ISO 4217 code or a DTI is expected", clipped(m.Currency))
		case m.Amount.Sign() < 0:
			return fmt.Errorf("max_order_notional: amount %s is negative", m.Amount)
		case i > 0 && d.OrderNotional[i-1].Currency == m.Currency:
			return fmt.Errorf("max_order_notional: %s stands twice", m.Currency)
		}
		if err := m.Block.normalise("max_order_notional"); err != nil {
			return err
		}
	}
	slices.SortFunc(d.OrderQty, func(a, b QtyLimit) int { return strings.Compare(a.Instrument, b.Instrument) })
	for i := range d.OrderQty {
		q := &d.OrderQty[i]
		switch {
		case q.Instrument != "*" && !slices.ContainsFunc(d.Instruments, func(in Instrument) bool { return in.ID == q.Instrument }):
			return fmt.Errorf("max_order_qty: %s is not in allowed_instruments; * is for all that have no entry", clipped(q.Instrument))
		case q.Qty.Sign() < 0:
			return fmt.Errorf("max_order_qty: qty %s is negative", q.Qty)
		case i > 0 && d.OrderQty[i-1].Instrument == q.Instrument:
			return fmt.Errorf("max_order_qty: %s stands twice", q.Instrument)
		}
		if err := q.Block.normalise("max_order_qty"); err != nil {
			return err
		}
	}
	if c := d.Collar; c != nil {
		if c.BPS > 1_000_000 || !validText(c.Source) || c.MaxAgeMS == 0 {
			return errors.New("price_collar_bps: bps of at most 1000000, a source and max_age_ms above 0 are expected")
		}
		if err := c.Block.normalise("price_collar_bps"); err != nil {
			return err
		}
	}
	if err := d.validateWindows(); err != nil {
		return err
	}
	if err := errors.Join(d.validateApproval(), d.validateControllers()); err != nil {
		return err
	}
	if d.DuplicateMS > maxDuplicateMS {
		return fmt.Errorf("duplicate_window_ms is %d, at most %d is allowed", d.DuplicateMS, maxDuplicateMS)
	}
	for i := range d.Trading {
		if err := d.Trading[i].normalise(); err != nil {
			return fmt.Errorf("trading_window: %w", err)
		}
	}
	slices.SortFunc(d.Trading, Hours.compare)
	d.Trading = slices.CompactFunc(d.Trading, func(a, b Hours) bool { return a.compare(b) == 0 })
	for _, t := range []struct {
		name string
		t    *time.Time
	}{{"not_before", d.NotBefore}, {"not_after", d.NotAfter}} {
		if t.t != nil && (t.t.Location() != time.UTC || t.t.Nanosecond() != 0) {
			return fmt.Errorf("%s: whole seconds in UTC are expected, such as 2026-07-27T09:30:00Z", t.name)
		}
	}
	if d.NotBefore != nil && d.NotAfter != nil && !d.NotBefore.Before(*d.NotAfter) {
		return errors.New("not_before is not before not_after")
	}
	if err := d.validateSource(); err != nil {
		return err
	}
	if d.OS != nil {
		if err := d.OS.validate(); err != nil {
			return fmt.Errorf("os: %w", err)
		}
	}
	return nil
}

func (b *Block) normalise(limit string) error {
	switch *b {
	case Hard, Soft:
	case "hard":
		*b = Hard // absent is its one spelling
	default:
		return fmt.Errorf("%s: block %s: hard or soft is expected", limit, clipped(string(*b)))
	}
	return nil
}

func oneOf(list []string) func(string) bool {
	return func(s string) bool { return slices.Contains(list, s) }
}

// set checks a list of names and sorts it.
func set[T ~string](name string, list []T, valid func(T) bool, want string) error {
	if len(list) > maxEntries {
		return fmt.Errorf("%s: %d entries, at most %d are allowed", name, len(list), maxEntries)
	}
	slices.Sort(list)
	for i, v := range list {
		if !valid(v) {
			return fmt.Errorf("%s: %s: %s is expected", name, clipped(string(v)), want)
		}
		if i > 0 && list[i-1] == v {
			return fmt.Errorf("%s: %s stands twice", name, v)
		}
	}
	return nil
}
