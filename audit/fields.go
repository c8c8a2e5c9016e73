package audit

import (
	"encoding/base64"
	"fmt"
	"reflect"
	"strings"

	"inkan/internal/certext"
	"inkan/scope"
)

// Fields are the fields of an exported entry, all derived from its statement
// and certificate. They are text, empty where there is nothing; names of FIX
// fields are FIX's. Times are UTC to the microsecond. docs/record.md has the table.
type Fields struct {
	Counter  string `json:"counter"`
	Time     string `json:"time"`
	Decision string `json:"decision"`
	Rule     string `json:"rule,omitzero"`
	Message  string `json:"message,omitzero"`
	Kind     string `json:"kind,omitzero"`
	ActionID string `json:"action_id,omitzero"`
	Venue    string `json:"venue,omitzero"`
	Event    string `json:"event,omitzero"` // of an event, whose kind is Kind: the exact text behind it

	Instrument       string `json:"instrument,omitzero"` // as scopes name it
	ClOrdID          string `json:"ClOrdID,omitzero"`
	OrigClOrdID      string `json:"OrigClOrdID,omitzero"`
	OrderID          string `json:"OrderID,omitzero"`
	Account          string `json:"Account,omitzero"`
	SecurityID       string `json:"SecurityID,omitzero"`
	SecurityIDSource string `json:"SecurityIDSource,omitzero"`
	Side             string `json:"Side,omitzero"`
	OrdType          string `json:"OrdType,omitzero"`
	Price            string `json:"Price,omitzero"`
	StopPx           string `json:"StopPx,omitzero"`
	OrderQty         string `json:"OrderQty,omitzero"`
	CashOrderQty     string `json:"CashOrderQty,omitzero"`
	BidPx            string `json:"BidPx,omitzero"`
	OfferPx          string `json:"OfferPx,omitzero"`
	BidSize          string `json:"BidSize,omitzero"`
	OfferSize        string `json:"OfferSize,omitzero"`
	Currency         string `json:"Currency,omitzero"`
	TimeInForce      string `json:"TimeInForce,omitzero"`
	ExpireTime       string `json:"ExpireTime,omitzero"`
	OrderCapacity    string `json:"OrderCapacity,omitzero"`

	PaymentAmount      string `json:"payment_amount,omitzero"`
	PaymentCurrency    string `json:"payment_currency,omitzero"`
	PaymentDestination string `json:"payment_destination,omitzero"`

	Participant        string `json:"participant,omitzero"` // LEI
	Client             string `json:"client,omitzero"`
	DecisionAlgorithm  string `json:"decision_algorithm,omitzero"`
	DecisionPerson     string `json:"decision_person,omitzero"`
	ExecutionAlgorithm string `json:"execution_algorithm,omitzero"`
	ExecutionPerson    string `json:"execution_person,omitzero"`

	Notional          string `json:"notional,omitzero"`
	NotionalCurrency  string `json:"notional_currency,omitzero"`
	Utilisation       string `json:"utilisation,omitzero"` // of limits over time, this action included
	ReferencePrice    string `json:"reference_price,omitzero"`
	ReferenceCurrency string `json:"reference_currency,omitzero"`
	ReferenceSource   string `json:"reference_source,omitzero"`
	ReferenceTime     string `json:"reference_time,omitzero"`
	ReferenceAgeMS    string `json:"reference_age_ms,omitzero"`

	Policy         string `json:"policy_sha256,omitzero"`  // in effect beside the certificate's scope
	Authorizations string `json:"authorizations,omitzero"` // of controllers, that came with the action: each the exact JWS, with spaces between

	ClockSource       string `json:"clock_source,omitzero"`        // who keeps the signer's clock
	ClockDivergenceUS string `json:"clock_divergence_us,omitzero"` // from UTC, at most, as the source estimates it

	NativeFormat string `json:"native_format,omitzero"`
	NativeSHA256 string `json:"native_sha256,omitzero"`

	Agent         string `json:"agent"`
	Issuer        string `json:"issuer"`
	Certificate   string `json:"certificate"` // SHA-256, as x5t#S256
	Serial        string `json:"serial"`
	Scope         string `json:"scope_sha256"`
	Device        string `json:"device"`
	KeyProtection string `json:"key_protection"`
	Evidence      string `json:"attestation_evidence"`
	AttestedAt    string `json:"attestation_time"`
	AttestedAgeS  string `json:"attestation_age_s"`
	Start         string `json:"start_document,omitzero"`   // SHA-256
	Executable    string `json:"start_executable,omitzero"` // SHA-256
	Expires       string `json:"expires"`
	Previous      string `json:"previous"`
	Signed        string `json:"signed"` // yes, or no
}

// fieldsOf derives the fields of an entry.
func fieldsOf(st *scope.Statement, c *certext.ActionCertificate, signed bool) *Fields {
	at := func(t scope.Timestamp) string { return t.Time.UTC().Format(scope.TimeFormat) }
	digest := func(d scope.Digest) string { return base64.RawURLEncoding.EncodeToString(d[:]) }
	f := &Fields{
		Counter: fmt.Sprint(uint64(st.Counter)), Time: at(st.Time), Decision: st.Decision.Decision, Rule: string(st.Decision.Rule), Message: st.Decision.Message,
		Kind: string(st.Kind), ActionID: st.ID, Venue: st.Audience, Event: st.Event, Instrument: st.Action().Instrument(),
		Agent: st.Agent, Issuer: st.Issuer, Certificate: digest(st.Decision.Certificate), Serial: c.Certificate.SerialNumber.Text(16), Scope: digest(st.Decision.Scope),
		Device: c.Attestation.Device, KeyProtection: c.Attestation.Protection,
		Evidence: st.Attestation.Evidence, AttestedAt: at(st.Attestation.Time), AttestedAgeS: fmt.Sprint(int64(st.Time.Time.Sub(st.Attestation.Time.Time).Seconds())),
		Expires: fmt.Sprint(st.Expires), Previous: digest(st.Previous), Signed: "no",
	}
	if signed {
		f.Signed = "yes"
	}
	if r := st.Run; r != nil {
		f.Start, f.Executable = digest(r.Start), digest(r.Executable)
	}
	if o := st.Order; o != nil {
		f.ClOrdID, f.OrigClOrdID, f.OrderID, f.Account, f.SecurityID, f.SecurityIDSource = o.ClOrdID, o.OrigClOrdID, o.OrderID, o.Account, o.SecurityID, o.SecurityIDSource
		f.Side, f.OrdType, f.Currency, f.TimeInForce, f.ExpireTime, f.OrderCapacity = o.Side, o.OrdType, o.Currency, o.TimeInForce, o.ExpireTime, o.OrderCapacity
		for _, d := range []struct {
			to *string
			of *scope.Decimal
		}{{&f.Price, o.Price}, {&f.StopPx, o.StopPx}, {&f.OrderQty, o.OrderQty}, {&f.CashOrderQty, o.CashOrderQty}, {&f.BidPx, o.BidPx}, {&f.OfferPx, o.OfferPx}, {&f.BidSize, o.BidSize}, {&f.OfferSize, o.OfferSize}} {
			if d.of != nil {
				*d.to = d.of.String()
			}
		}
	}
	if p := st.Payment; p != nil {
		f.PaymentAmount, f.PaymentCurrency, f.PaymentDestination = p.Amount.String(), p.Currency, p.Destination
	}
	if p := st.Party; p != nil {
		f.Participant, f.Client = p.LEI, p.Client
		if p.Decision != nil {
			f.DecisionAlgorithm, f.DecisionPerson = p.Decision.Algorithm, p.Decision.Natural
		}
		if p.Execution != nil {
			f.ExecutionAlgorithm, f.ExecutionPerson = p.Execution.Algorithm, p.Execution.Natural
		}
	}
	if n := st.Decision.Notional; n != nil {
		f.Notional, f.NotionalCurrency = n.Amount.String(), n.Currency
	}
	if r := st.Decision.Reference; r != nil {
		f.ReferencePrice, f.ReferenceCurrency, f.ReferenceSource, f.ReferenceTime = r.Price.String(), r.Currency, r.Source, at(r.Time)
		f.ReferenceAgeMS = fmt.Sprint(st.Time.Time.Sub(r.Time.Time).Milliseconds())
	}
	if p := st.Decision.Policy; p != nil {
		f.Policy = digest(*p)
	}
	f.Authorizations = strings.Join(st.Authorized, " ")
	if c := st.Clock; c != nil {
		f.ClockSource, f.ClockDivergenceUS = c.Source, fmt.Sprint(c.Divergence)
	}
	if n := st.Native; n != nil {
		f.NativeFormat, f.NativeSHA256 = n.Format, n.SHA256
	}
	var used []string
	for _, u := range st.Decision.Utilisation {
		used = append(used, strings.Join(strings.Fields(fmt.Sprintf("%s %s %s of %s in %s", u.Limit, u.Key, u.Used, u.Of, u.Window)), " "))
	}
	f.Utilisation = strings.Join(used, "; ")
	return f
}

// FieldNames lists the names of the fields in the order of their columns.
func FieldNames() []string {
	t := reflect.TypeFor[Fields]()
	out := make([]string, t.NumField())
	for i := range out {
		out[i], _, _ = strings.Cut(t.Field(i).Tag.Get("json"), ",")
	}
	return out
}

// values lists the fields in the order of FieldNames.
func (f *Fields) values() []string {
	v := reflect.ValueOf(*f)
	out := make([]string, v.NumField())
	for i := range out {
		out[i] = v.Field(i).String()
	}
	return out
}
