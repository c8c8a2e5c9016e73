package scope

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"inkan/internal/strictjson"
)

// MaxAction bounds an action's JSON, in bytes. A leaf of the record, which
// repeats it, has room for four times as much.
const MaxAction = 16 << 10

// maxText bounds an identifier in an action or a scope, in bytes.
const maxText = 64

// Kind is a kind of action, out of a closed registry.
type Kind string

// The registry. Payments are known so that a scope can allow them by name;
// nothing allows them by default.
const (
	OrderNew        Kind = "order.new"
	OrderReplace    Kind = "order.replace"
	OrderCancel     Kind = "order.cancel"
	OrderMassCancel Kind = "order.mass_cancel"
	QuoteNew        Kind = "quote.new"
	Transfer        Kind = "payment.transfer"
	Withdraw        Kind = "payment.withdraw"
)

// Kinds lists the registry in its order.
var Kinds = []Kind{OrderNew, OrderReplace, OrderCancel, OrderMassCancel, QuoteNew, Transfer, Withdraw}

// reducesRisk: cancels pass every limit but identity and venue (rule G7).
func (k Kind) reducesRisk() bool { return k == OrderCancel || k == OrderMassCancel }

// ReducesRisk says whether this is a cancel, which no limit and no kill stops.
func (k Kind) ReducesRisk() bool { return k.reducesRisk() }

// Action is what an agent asks to do. Members have the names of FIX fields
// where FIX has them. An Action from ParseAction is valid; treat it as read-only.
type Action struct {
	ID       string   `json:"id"`  // 16 random bytes in base64url: 22 characters
	Audience string   `json:"aud"` // the venue: a MIC (ISO 10383), or lei: and an LEI
	Kind     Kind     `json:"act"`
	Order    *Order   `json:"ord,omitzero"`
	Payment  *Payment `json:"pay,omitzero"`
	Party    *Party   `json:"pty,omitzero"`
	Native   *Native  `json:"native,omitzero"`
}

// Order holds FIX fields; the number behind each is its tag.
type Order struct {
	ClOrdID          string   `json:"ClOrdID,omitzero"`          // 11
	OrigClOrdID      string   `json:"OrigClOrdID,omitzero"`      // 41
	OrderID          string   `json:"OrderID,omitzero"`          // 37
	Account          string   `json:"Account,omitzero"`          // 1
	SecurityID       string   `json:"SecurityID,omitzero"`       // 48
	SecurityIDSource string   `json:"SecurityIDSource,omitzero"` // 22: 4 ISIN, 8 exchange symbol, Y DTI
	Side             string   `json:"Side,omitzero"`             // 54: 1 buy, 2 sell, 5 sell short, 6 sell short exempt
	OrdType          string   `json:"OrdType,omitzero"`          // 40: 1 market, 2 limit, 3 stop, 4 stop limit
	Price            *Decimal `json:"Price,omitzero"`            // 44
	StopPx           *Decimal `json:"StopPx,omitzero"`           // 99
	OrderQty         *Decimal `json:"OrderQty,omitzero"`         // 38
	CashOrderQty     *Decimal `json:"CashOrderQty,omitzero"`     // 152
	BidPx            *Decimal `json:"BidPx,omitzero"`            // 132
	OfferPx          *Decimal `json:"OfferPx,omitzero"`          // 133
	BidSize          *Decimal `json:"BidSize,omitzero"`          // 134
	OfferSize        *Decimal `json:"OfferSize,omitzero"`        // 135
	Currency         string   `json:"Currency,omitzero"`         // 15
	TimeInForce      string   `json:"TimeInForce,omitzero"`      // 59: 0 day, 1 GTC, 2 opening, 3 IOC, 4 FOK, 6 GTD, 7 closing
	ExpireTime       string   `json:"ExpireTime,omitzero"`       // 126, RFC 3339 in UTC
	OrderCapacity    string   `json:"OrderCapacity,omitzero"`    // 528
}

// Payment is a movement of money or tokens.
type Payment struct {
	Amount      Decimal `json:"Amount"`
	Currency    string  `json:"Currency"`
	Destination string  `json:"Destination"`
}

// Party says for whom and by whom (RTS 24; CDR (EU) 2025/1140).
type Party struct {
	LEI       string  `json:"lei,omitzero"`    // the participant (ISO 17442)
	Client    string  `json:"client,omitzero"` // FIX PartyRole 3
	Decision  *Person `json:"dec,omitzero"`    // investment decision within firm, FIX PartyRole 122
	Execution *Person `json:"exe,omitzero"`    // execution within firm, FIX PartyRole 12
}

// Person is an algorithm or a natural person: exactly one is set.
type Person struct {
	Algorithm string `json:"algo,omitzero"`
	Natural   string `json:"person,omitzero"`
}

// Native binds the message that goes to the venue.
type Native struct {
	Format string `json:"fmt"`     // http-body, fix-body or ws-text
	SHA256 string `json:"sha-256"` // of the bytes that the format names, lower-case hex
}

// ParseAction reads an action, strictly. Its error is always a *Refusal with
// RuleForm that says which member is wrong and what would be right.
func ParseAction(b []byte) (*Action, error) {
	var a Action
	if err := strictjson.Unmarshal(b, MaxAction, &a); err != nil {
		return nil, &Refusal{Rule: RuleForm, Message: err.Error()}
	}
	if r := a.validate(); r != nil {
		return nil, r
	}
	return &a, nil
}

// Canonical returns the one spelling of a.
func (a *Action) Canonical() ([]byte, error) { return strictjson.Marshal(a) }

// Instrument names the order's instrument as scopes do, such as isin:FR0000120271.
// It is empty where the action names none.
func (a *Action) Instrument() string {
	if a.Order == nil || a.Order.SecurityID == "" {
		return ""
	}
	return instrumentPrefix(a.Order.SecurityIDSource) + a.Order.SecurityID
}

func instrumentPrefix(source string) string {
	switch source {
	case "4":
		return "isin:"
	case "8":
		return "symbol:"
	case "Y":
		return "dti:"
	}
	return ""
}

func malformed(field, format string, args ...any) *Refusal {
	return &Refusal{Rule: RuleForm, Field: field, Message: field + ": " + fmt.Sprintf(format, args...)}
}

func (a *Action) validate() *Refusal {
	if id, err := base64.RawURLEncoding.Strict().DecodeString(a.ID); err != nil || len(id) != 16 || len(a.ID) != 22 {
		return malformed("id", "16 random bytes in base64url without padding are expected (22 characters)")
	}
	if !validVenue(a.Audience) {
		return malformed("aud", "%s is not a venue: write a MIC such as XPAR, or lei: and an LEI", clipped(a.Audience))
	}
	if !slices.Contains(Kinds, a.Kind) {
		return malformed("act", "%s is not a kind of action; the kinds are %s", clipped(string(a.Kind)), join(Kinds))
	}
	payment := a.Kind == Transfer || a.Kind == Withdraw
	switch {
	case payment && (a.Payment == nil || a.Order != nil):
		return malformed("pay", "%s has pay and no ord", a.Kind)
	case !payment && (a.Order == nil || a.Payment != nil):
		return malformed("ord", "%s has ord and no pay", a.Kind)
	}
	if r := a.Party.validate(); r != nil {
		return r
	}
	if r := a.Native.validate(); r != nil {
		return r
	}
	if payment {
		return a.Payment.validate()
	}
	return a.Order.validate(a.Kind)
}

func (o *Order) validate(k Kind) *Refusal {
	for _, f := range []struct{ name, text string }{
		{"ClOrdID", o.ClOrdID}, {"OrigClOrdID", o.OrigClOrdID}, {"OrderID", o.OrderID},
		{"Account", o.Account}, {"OrderCapacity", o.OrderCapacity},
	} {
		if f.text != "" && !validText(f.text) {
			return malformed("ord."+f.name, "at most %d printable ASCII characters without spaces are allowed", maxText)
		}
	}
	if k.reducesRisk() {
		return o.validateCancel(k)
	}
	if r := o.validateInstrument(); r != nil {
		return r
	}
	for _, f := range []struct {
		name string
		d    *Decimal
	}{
		{"OrderQty", o.OrderQty}, {"CashOrderQty", o.CashOrderQty}, {"BidSize", o.BidSize}, {"OfferSize", o.OfferSize},
	} {
		if f.d != nil && f.d.Sign() <= 0 {
			return malformed("ord."+f.name, "%s is not positive", f.d)
		}
	}
	if !validCurrency(o.Currency) {
		return malformed("ord.Currency", "an ISO 4217 code such as EUR, or a DTI of nine characters, is expected")
	}
	if o.ExpireTime != "" {
		t, err := time.Parse(time.RFC3339, o.ExpireTime)
		if err != nil || t.UTC().Format(time.RFC3339) != o.ExpireTime {
			return malformed("ord.ExpireTime", "a time such as 2026-07-27T09:30:00Z is expected")
		}
	}
	if k == QuoteNew {
		return o.validateQuote()
	}
	return o.validateOrder(k)
}

func (o *Order) validateInstrument() *Refusal {
	switch o.SecurityIDSource {
	case "4":
		if !validISIN(o.SecurityID) {
			return malformed("ord.SecurityID", "%s is not an ISIN (ISO 6166): twelve characters with a check digit", clipped(o.SecurityID))
		}
	case "8":
		if !validText(o.SecurityID) {
			return malformed("ord.SecurityID", "an exchange symbol of at most %d printable characters is expected", maxText)
		}
	case "Y":
		if !validDTI(o.SecurityID) {
			return malformed("ord.SecurityID", "%s is not a DTI (ISO 24165): nine characters", clipped(o.SecurityID))
		}
	default:
		return malformed("ord.SecurityIDSource", "4 (ISIN), 8 (exchange symbol) or Y (DTI) is expected")
	}
	return nil
}

func (o *Order) validateCancel(k Kind) *Refusal {
	if k == OrderCancel && o.ClOrdID == "" {
		return malformed("ord.ClOrdID", "is missing")
	}
	if k == OrderCancel && o.OrigClOrdID == "" && o.OrderID == "" {
		return malformed("ord.OrigClOrdID", "a cancel names the order by OrigClOrdID or OrderID")
	}
	if o.SecurityID != "" || o.SecurityIDSource != "" {
		if r := o.validateInstrument(); r != nil {
			return r
		}
	}
	if o.Side != "" && !slices.Contains(sides, o.Side) {
		return malformed("ord.Side", "one of %s is expected", join(sides))
	}
	if o.Price != nil || o.StopPx != nil || o.OrderQty != nil || o.CashOrderQty != nil || o.BidPx != nil || o.OfferPx != nil ||
		o.BidSize != nil || o.OfferSize != nil || o.OrdType != "" || o.TimeInForce != "" || o.ExpireTime != "" || o.Currency != "" {
		return malformed("ord", "%s has no price, quantity, type, currency or time in force", k)
	}
	return nil
}

func (o *Order) validateQuote() *Refusal {
	if o.ClOrdID == "" {
		return malformed("ord.ClOrdID", "is missing")
	}
	if o.Side != "" || o.OrdType != "" || o.Price != nil || o.StopPx != nil || o.OrderQty != nil || o.CashOrderQty != nil {
		return malformed("ord", "a quote has BidPx, BidSize, OfferPx and OfferSize, and no side, type, price or quantity")
	}
	if (o.BidPx == nil) != (o.BidSize == nil) || (o.OfferPx == nil) != (o.OfferSize == nil) || o.BidPx == nil && o.OfferPx == nil {
		return malformed("ord", "a quote has a bid, an offer or both, each with price and size")
	}
	return o.validateTIF()
}

func (o *Order) validateOrder(k Kind) *Refusal {
	if o.ClOrdID == "" {
		return malformed("ord.ClOrdID", "is missing")
	}
	if (k == OrderReplace) != (o.OrigClOrdID != "") {
		return malformed("ord.OrigClOrdID", "names the order that order.replace replaces, and stands nowhere else")
	}
	if o.BidPx != nil || o.OfferPx != nil || o.BidSize != nil || o.OfferSize != nil {
		return malformed("ord", "only a quote has BidPx, BidSize, OfferPx and OfferSize")
	}
	if !slices.Contains(sides, o.Side) {
		return malformed("ord.Side", "one of %s is expected", join(sides))
	}
	if (o.OrderQty == nil) == (o.CashOrderQty == nil) {
		return malformed("ord.OrderQty", "exactly one of OrderQty and CashOrderQty is expected")
	}
	// A market order may carry a protective price; whether it must is for the notional to say.
	stop := o.OrdType == "3" || o.OrdType == "4"
	switch {
	case !slices.Contains(ordTypes, o.OrdType):
		return malformed("ord.OrdType", "one of %s is expected", join(ordTypes))
	case (o.OrdType == "2" || o.OrdType == "4") && o.Price == nil:
		return malformed("ord.Price", "OrdType %s needs a price", o.OrdType)
	case stop != (o.StopPx != nil):
		return malformed("ord.StopPx", "stands with OrdType 3 and 4, and only there")
	}
	return o.validateTIF()
}

func (o *Order) validateTIF() *Refusal {
	if !slices.Contains(tifs, o.TimeInForce) {
		return malformed("ord.TimeInForce", "one of %s is expected", join(tifs))
	}
	if (o.TimeInForce == "6") != (o.ExpireTime != "") {
		return malformed("ord.ExpireTime", "stands with TimeInForce 6, and only there")
	}
	return nil
}

func (p *Payment) validate() *Refusal {
	switch {
	case p.Amount.Sign() <= 0:
		return malformed("pay.Amount", "%s is not positive", p.Amount)
	case !validCurrency(p.Currency):
		return malformed("pay.Currency", "an ISO 4217 code such as EUR, or a DTI of nine characters, is expected")
	case !validText(p.Destination):
		return malformed("pay.Destination", "at most %d printable ASCII characters without spaces are allowed", maxText)
	}
	return nil
}

func (p *Party) validate() *Refusal {
	if p == nil {
		return nil
	}
	if p.LEI != "" && !validLEI(p.LEI) {
		return malformed("pty.lei", "%s is not an LEI (ISO 17442): twenty characters with check digits", clipped(p.LEI))
	}
	if p.Client != "" && !validText(p.Client) {
		return malformed("pty.client", "at most %d printable ASCII characters without spaces are allowed", maxText)
	}
	for _, f := range []struct {
		name string
		who  *Person
	}{{"pty.dec", p.Decision}, {"pty.exe", p.Execution}} {
		if f.who == nil {
			continue
		}
		if (f.who.Algorithm == "") == (f.who.Natural == "") || !validText(f.who.Algorithm+f.who.Natural) {
			return malformed(f.name, "exactly one of algo and person is expected, of at most %d printable ASCII characters", maxText)
		}
	}
	return nil
}

// Formats of native messages: which bytes are signed for.
const (
	NativeHTTPBody = "http-body" // an HTTP request's body
	NativeFIXBody  = "fix-body"  // a FIX message without the fields that engines rewrite
	NativeWSText   = "ws-text"   // a WebSocket's text message
)

var natives = []string{NativeHTTPBody, NativeFIXBody, NativeWSText}

func (n *Native) validate() *Refusal {
	if n == nil {
		return nil
	}
	if !slices.Contains(natives, n.Format) {
		return malformed("native.fmt", "%s is not a format of native messages; the formats are %s", clipped(n.Format), join(natives))
	}
	if b, err := hex.DecodeString(n.SHA256); err != nil || len(b) != 32 || strings.ToLower(n.SHA256) != n.SHA256 {
		return malformed("native.sha-256", "32 bytes in lower-case hex are expected")
	}
	return nil
}

func join[T ~string](list []T) string {
	s := make([]string, len(list))
	for i, v := range list {
		s[i] = string(v)
	}
	return strings.Join(s, ", ")
}
