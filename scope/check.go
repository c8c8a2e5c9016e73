package scope

import (
	"fmt"
	"slices"
	"time"
)

// Env is what Check knows beside scope and action. It comes from the signer or
// the receiver, never from the agent.
type Env struct {
	Now        time.Time       // the time of the action
	Reference  *ReferencePrice // for the action's instrument; nil: there is none
	AttestedAt time.Time       // when the evidence behind the certificate was appraised
	Run        *Run            // how the process that asks was started; nil: not under confinement
	Clock      *Clock          // what is known of the signer's clock; nil: nothing

	Agent          string   // SPIFFE ID; needed where there are authorizations
	Authorizations []string // what controllers signed for this action: [Authorization]
}

// Permit shows that Check allowed an action. Only Check makes one; the zero
// value is no permit.
type Permit struct {
	action   *Action
	scope    *Scope
	env      Env
	notional Decimal
	currency string
	lifts    []Rule // that were authorized

	instrument string // of the action, as scopes name it
}

// Valid says whether Check made p.
func (p *Permit) Valid() bool { return p != nil && p.action != nil }

// Action returns the action that was allowed.
func (p *Permit) Action() *Action { return p.action }

// Scope returns the scope that allowed it.
func (p *Permit) Scope() *Scope { return p.scope }

// Env returns what was known at the check.
func (p *Permit) Env() Env { return p.env }

// UsedReference returns the reference price that the collar was checked
// against; nil where the scope has no collar or the action no price.
func (p *Permit) UsedReference() *ReferencePrice {
	if p.scope.doc.Collar == nil || p.order() == nil {
		return nil
	}
	return p.env.Reference
}

// Notional returns the computed notional and its currency; ok is false for
// actions that have none, such as a cancel.
func (p *Permit) Notional() (amount Decimal, currency string, ok bool) {
	return p.notional, p.currency, p.currency != ""
}

// Check holds a valid action against a scope. It applies the rules in the
// order in which rules are declared in this package and stops at the first
// that refuses. Its error is always a *[Refusal].
func Check(s *Scope, a *Action, env Env) (*Permit, error) {
	p, r := check(s, a, env)
	if r != nil {
		return nil, r
	}
	return p, nil
}

func check(s *Scope, a *Action, env Env) (*Permit, *Refusal) {
	p, r := begin(s, a, env)
	if r != nil {
		return nil, r
	}
	for _, rule := range rules {
		if r := lift(p.lifts, rule(p)); r != nil {
			return nil, r
		}
	}
	return p, nil
}

// Explain returns every rule that refuses the action, in the order of Check;
// none if it is allowed.
func Explain(s *Scope, a *Action, env Env) []*Refusal {
	p, r := begin(s, a, env)
	if r != nil {
		return []*Refusal{r}
	}
	var all []*Refusal
	for _, rule := range rules {
		if r := lift(p.lifts, rule(p)); r != nil {
			all = append(all, r)
		}
	}
	return all
}

func begin(s *Scope, a *Action, env Env) (*Permit, *Refusal) {
	switch {
	case s == nil || s.canonical == nil:
		return nil, &Refusal{Rule: RuleActions, Message: "there is no scope, so nothing is allowed"}
	case a == nil:
		return nil, &Refusal{Rule: RuleForm, Message: "there is no action"}
	case env.Now.IsZero():
		return nil, &Refusal{Rule: RuleTradingWindow, Message: "the time of the action is not known"}
	}
	p := &Permit{action: a, scope: s, env: env, instrument: s.nameOf(a)}
	return p, p.authorize()
}

// nameOf returns the action's instrument. One that is allowed costs no allocation.
func (s *Scope) nameOf(a *Action) string {
	if a.Order == nil || a.Order.SecurityID == "" {
		return ""
	}
	var room [len("symbol:") + maxText]byte
	name := append(append(room[:0], instrumentPrefix(a.Order.SecurityIDSource)...), a.Order.SecurityID...)
	if id, ok := s.ids[string(name)]; ok {
		return id
	}
	return string(name)
}

// rules in the order of the Rule constants. Each looks at what the scope says
// and returns a refusal or nil. Cancels skip those below checkVenue (G7).
var rules = [...]func(*Permit) *Refusal{
	(*Permit).checkLifetime,
	(*Permit).checkAttestationAge,
	(*Permit).checkRun,
	(*Permit).checkVenue,
	(*Permit).checkKind,
	(*Permit).checkTradingWindow,
	(*Permit).checkClock,
	(*Permit).checkAccount,
	(*Permit).checkClient,
	(*Permit).checkInstrument,
	(*Permit).checkSide,
	(*Permit).checkOrdType,
	(*Permit).checkTIF,
	(*Permit).checkQty,
	(*Permit).checkNotional,
	(*Permit).checkApproval,
	(*Permit).checkCollar,
}

func (p *Permit) checkLifetime() *Refusal {
	d := &p.scope.doc
	if d.NotBefore != nil && p.env.Now.Before(*d.NotBefore) {
		return &Refusal{Rule: RuleNotBefore, Limit: d.NotBefore.Format(time.RFC3339), Value: p.env.Now.UTC().Format(time.RFC3339),
			Message: "the scope begins at " + d.NotBefore.Format(time.RFC3339)}
	}
	if d.NotAfter != nil && p.env.Now.After(*d.NotAfter) {
		return &Refusal{Rule: RuleNotAfter, Limit: d.NotAfter.Format(time.RFC3339), Value: p.env.Now.UTC().Format(time.RFC3339),
			Message: "the scope ended at " + d.NotAfter.Format(time.RFC3339)}
	}
	return nil
}

func (p *Permit) checkAttestationAge() *Refusal {
	max := p.scope.doc.AttestationS
	if max == 0 {
		return nil
	}
	age := p.env.Now.Sub(p.env.AttestedAt)
	if p.env.AttestedAt.IsZero() || age > time.Duration(max)*time.Second {
		return &Refusal{Rule: RuleAttestationAge, Limit: fmt.Sprint(max), Value: fmt.Sprint(int64(age / time.Second)),
			Message: fmt.Sprintf("the host was attested %d s ago, at most %d s are allowed: renew the certificate", int64(age/time.Second), max)}
	}
	return nil
}

func (p *Permit) checkRun() *Refusal {
	if o := p.scope.doc.OS; o != nil {
		return o.Refuses(p.env.Run)
	}
	if p.env.Run != nil {
		return &Refusal{Rule: RuleOS, Field: "run", Message: "the agent was started under an os section, and its scope has none: start it again"}
	}
	return nil
}

func (p *Permit) checkVenue() *Refusal {
	a := p.action
	if _, ok := slices.BinarySearch(p.scope.doc.Venues, a.Audience); !ok {
		return &Refusal{Rule: RuleVenues, Field: "aud", Value: a.Audience, Limit: join(p.scope.doc.Venues),
			Message: fmt.Sprintf("venue %s is not allowed; allowed: %s", a.Audience, join(p.scope.doc.Venues))}
	}
	return nil
}

func (p *Permit) checkKind() *Refusal {
	k := p.action.Kind
	if k.reducesRisk() {
		return nil
	}
	if _, ok := slices.BinarySearch(p.scope.doc.Actions, k); !ok {
		return &Refusal{Rule: RuleActions, Field: "act", Value: string(k), Limit: join(p.scope.doc.Actions),
			Message: fmt.Sprintf("%s is not allowed; allowed: %s, and cancels", k, join(p.scope.doc.Actions))}
	}
	return nil
}

func (p *Permit) checkTradingWindow() *Refusal {
	if p.action.Kind.reducesRisk() || p.scope.trading == nil || p.scope.trading.has(p.env.Now) {
		return nil
	}
	at := p.env.Now.UTC().Format("Mon 15:04")
	return &Refusal{Rule: RuleTradingWindow, Value: at, Limit: describeHours(p.scope.doc.Trading),
		Message: fmt.Sprintf("%s UTC is outside the trading window: %s", at, describeHours(p.scope.doc.Trading))}
}

func (p *Permit) checkAccount() *Refusal {
	o := p.action.Order
	if p.action.Kind.reducesRisk() || o == nil {
		return nil
	}
	return member(RuleAccounts, "ord.Account", o.Account, p.scope.doc.Accounts)
}

func (p *Permit) checkClient() *Refusal {
	if p.action.Kind.reducesRisk() {
		return nil
	}
	client := ""
	if p.action.Party != nil {
		client = p.action.Party.Client
	}
	return member(RuleClients, "pty.client", client, p.scope.doc.Clients)
}

// member: without a list nothing may be named; with one something on it must be.
func member(rule Rule, field, value string, list []string) *Refusal {
	if len(list) == 0 && value == "" {
		return nil
	}
	if _, ok := slices.BinarySearch(list, value); ok {
		return nil
	}
	switch {
	case len(list) == 0:
		return &Refusal{Rule: rule, Field: field, Value: value, Message: fmt.Sprintf("%s is set, but the scope has no %s", field, rule)}
	case value == "":
		return &Refusal{Rule: rule, Field: field, Limit: join(list), Message: fmt.Sprintf("%s is missing; allowed: %s", field, join(list))}
	}
	return &Refusal{Rule: rule, Field: field, Value: value, Limit: join(list), Message: fmt.Sprintf("%s %s is not allowed; allowed: %s", field, value, join(list))}
}

// order returns the order if it is one that the rules of trading apply to.
func (p *Permit) order() *Order {
	if p.action.Kind.reducesRisk() {
		return nil
	}
	return p.action.Order
}

func (p *Permit) checkInstrument() *Refusal {
	if p.order() == nil {
		return nil
	}
	id := p.instrument
	if _, ok := p.scope.instruments[id]; !ok {
		return &Refusal{Rule: RuleInstruments, Field: "ord.SecurityID", Value: id,
			Message: fmt.Sprintf("instrument %s is not one of the %d that are allowed", id, len(p.scope.instruments))}
	}
	return nil
}

func (p *Permit) checkSide() *Refusal {
	o := p.order()
	if o == nil {
		return nil
	}
	list := p.scope.doc.Sides
	if p.action.Kind == QuoteNew { // a quote is on both sides that it names
		if _, buy := slices.BinarySearch(list, "1"); o.BidPx != nil && !buy {
			return notAllowed(RuleSides, "ord.BidPx", "1", list)
		}
		if _, sell := slices.BinarySearch(list, "2"); o.OfferPx != nil && !sell {
			return notAllowed(RuleSides, "ord.OfferPx", "2", list)
		}
		return nil
	}
	if _, ok := slices.BinarySearch(list, o.Side); !ok {
		return notAllowed(RuleSides, "ord.Side", o.Side, list)
	}
	if (o.Side == "5" || o.Side == "6") && !p.scope.doc.Short {
		return &Refusal{Rule: RuleShort, Field: "ord.Side", Value: o.Side, Limit: "false", Message: "short sales are not allowed"}
	}
	return nil
}

func (p *Permit) checkOrdType() *Refusal {
	o := p.order()
	if o == nil || p.action.Kind == QuoteNew {
		return nil
	}
	if _, ok := slices.BinarySearch(p.scope.doc.OrdTypes, o.OrdType); !ok {
		return notAllowed(RuleOrdTypes, "ord.OrdType", o.OrdType, p.scope.doc.OrdTypes)
	}
	return nil
}

func (p *Permit) checkTIF() *Refusal {
	o := p.order()
	if o == nil {
		return nil
	}
	if _, ok := slices.BinarySearch(p.scope.doc.TIF, o.TimeInForce); !ok {
		return notAllowed(RuleTIF, "ord.TimeInForce", o.TimeInForce, p.scope.doc.TIF)
	}
	return nil
}

func notAllowed(rule Rule, field, value string, list []string) *Refusal {
	return &Refusal{Rule: rule, Field: field, Value: value, Limit: join(list),
		Message: fmt.Sprintf("%s %s is not allowed; allowed: %s", field, value, join(list))}
}

func (p *Permit) checkQty() *Refusal {
	o := p.order()
	if o == nil || len(p.scope.doc.OrderQty) == 0 {
		return nil
	}
	limit, ok := p.scope.qty[p.instrument]
	if !ok {
		limit, ok = p.scope.qty["*"]
	}
	if !ok {
		return &Refusal{Rule: RuleOrderQty, Field: "ord.SecurityID", Value: p.instrument,
			Message: "max_order_qty has no entry for this instrument, and none for *"}
	}
	for _, q := range [...]struct {
		field string
		qty   *Decimal
	}{{"ord.OrderQty", o.OrderQty}, {"ord.BidSize", o.BidSize}, {"ord.OfferSize", o.OfferSize}} {
		if q.qty != nil && q.qty.Cmp(limit.Qty) > 0 {
			return exceeds(RuleOrderQty, q.field, "the quantity", *q.qty, limit.Qty, "").of(limit.Block)
		}
	}
	if o.CashOrderQty != nil {
		return &Refusal{Rule: RuleOrderQty, Field: "ord.CashOrderQty", Value: o.CashOrderQty.String(), Limit: limit.Qty.String(),
			Message: "an order by amount has no quantity that max_order_qty could bound: give OrderQty"}
	}
	return nil
}

func exceeds(rule Rule, field, what string, value, limit Decimal, unit string) *Refusal {
	r := &Refusal{Rule: rule, Field: field, Value: value.String(), Limit: limit.String()}
	if over, ok := value.Sub(limit); ok {
		r.Excess = over.String()
	}
	if unit != "" {
		unit = " " + unit
	}
	r.Message = fmt.Sprintf("%s is %s%s, at most %s%s is allowed: %s%s too much", what, r.Value, unit, r.Limit, unit, r.Excess, unit)
	return r
}

// checkNotional computes the notional (rule G4), never takes it from the agent.
func (p *Permit) checkNotional() *Refusal {
	var field, currency string
	var n Decimal
	switch {
	case p.action.Payment != nil:
		field, currency, n = "pay.Amount", p.action.Payment.Currency, p.action.Payment.Amount
	case p.order() != nil:
		o := p.order()
		var r *Refusal
		if n, field, r = p.orderNotional(o); r != nil {
			return r
		}
		currency = o.Currency
	default:
		return nil
	}
	limit, ok := p.scope.notional[currency]
	if !ok {
		return &Refusal{Rule: RuleOrderNotional, Field: "ord.Currency", Value: currency,
			Message: fmt.Sprintf("max_order_notional has no entry for %s", currency)}
	}
	p.notional, p.currency = n, currency
	if n.Cmp(limit.Amount) > 0 {
		return exceeds(RuleOrderNotional, field, "the notional", n, limit.Amount, currency).of(limit.Block)
	}
	return nil
}

func (p *Permit) orderNotional(o *Order) (n Decimal, field string, _ *Refusal) {
	multiplier := p.scope.instruments[p.instrument]
	ok := true
	switch {
	case p.action.Kind == QuoteNew: // both sides count
		for _, side := range [...]struct{ px, size *Decimal }{{o.BidPx, o.BidSize}, {o.OfferPx, o.OfferSize}} {
			if side.px == nil {
				continue
			}
			one, fits := product(*side.px, *side.size, multiplier)
			var sum bool
			n, sum = n.Add(one)
			ok = ok && fits && sum
		}
		field = "ord.BidPx"
	case o.CashOrderQty != nil:
		n, field = *o.CashOrderQty, "ord.CashOrderQty"
	case o.Price != nil: // limit, stop limit, or the protective price of another
		n, ok = product(*o.Price, *o.OrderQty, multiplier)
		field = "ord.OrderQty"
	default:
		return n, "", &Refusal{Rule: RuleNotionalUndefined, Field: "ord.Price",
			Message: "without a price the notional is not defined: give a protective Price, or CashOrderQty"}
	}
	if !ok {
		return n, "", &Refusal{Rule: RuleNotionalOverflow, Field: field,
			Message: fmt.Sprintf("price x quantity x multiplier has more than %d digits before the point", maxIntegerDigits)}
	}
	return n, field, nil
}

func (p *Permit) checkCollar() *Refusal {
	o, c := p.order(), p.scope.doc.Collar
	if o == nil || c == nil {
		return nil
	}
	ref := p.env.Reference
	if ref == nil || ref.Instrument != p.instrument || ref.Source != c.Source || ref.Currency != o.Currency || ref.Price.Sign() <= 0 {
		return &Refusal{Rule: RuleReferenceMissing, Field: "ord.Price", Value: p.instrument,
			Message: fmt.Sprintf("there is no reference price of %s in %s from %s, so the collar cannot be checked", p.instrument, o.Currency, c.Source)}
	}
	// A reference from after the order is as wrong as one that is too old.
	if age := p.env.Now.Sub(ref.Time); age < 0 || age > time.Duration(c.MaxAgeMS)*time.Millisecond {
		return &Refusal{Rule: RuleReferenceStale, Value: fmt.Sprint(age.Milliseconds()), Limit: fmt.Sprint(c.MaxAgeMS),
			Message: fmt.Sprintf("the reference price of %s is %d ms old, 0 to %d ms are allowed", ref.Instrument, age.Milliseconds(), c.MaxAgeMS)}
	}
	priced := false
	for _, f := range [...]struct {
		field string
		px    *Decimal
	}{{"ord.Price", o.Price}, {"ord.StopPx", o.StopPx}, {"ord.BidPx", o.BidPx}, {"ord.OfferPx", o.OfferPx}} {
		if f.px == nil {
			continue
		}
		priced = true
		if !withinBps(*f.px, ref.Price, c.BPS) {
			r := &Refusal{Rule: RuleCollar, Field: f.field, Value: f.px.String(), Limit: fmt.Sprint(c.BPS),
				Message: fmt.Sprintf("%s %s is more than %d basis points away from the reference %s", f.field, f.px, c.BPS, ref.Price)}
			return r.of(c.Block)
		}
	}
	if !priced {
		return &Refusal{Rule: RuleCollar, Field: "ord.Price", Message: "an order without a price cannot be inside the collar: give a protective Price"}
	}
	return nil
}
