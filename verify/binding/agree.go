package binding

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"inkan/scope"
)

// Profile is what a venue's FIX says beyond the action, and what it takes for
// granted. The zero value takes nothing but what an action has.
type Profile struct {
	// Free tags are not compared. Nothing that changes an order may be one.
	Free []int
	// Implied are fields of the action that the venue's messages do not say, by their
	// tag, and the value that the venue then takes; "*" is any value.
	Implied map[int]string
}

// kinds of actions by MsgType(35).
var kinds = map[string]scope.Kind{"D": scope.OrderNew, "G": scope.OrderReplace, "F": scope.OrderCancel, "q": scope.OrderMassCancel, "S": scope.QuoteNew}

// fieldsOf returns an order's fields by FIX tag.
func fieldsOf(o *scope.Order, k scope.Kind) map[int]string {
	out := map[int]string{1: o.Account, tagIDSource: o.SecurityIDSource, 37: o.OrderID, 40: o.OrdType, 41: o.OrigClOrdID, tagSecurityID: o.SecurityID, 54: o.Side, 59: o.TimeInForce, 15: o.Currency, tagExpireTime: o.ExpireTime, 528: o.OrderCapacity}
	id := 11
	if k == scope.QuoteNew {
		id = tagQuoteID
	}
	out[id] = o.ClOrdID
	for tag, d := range map[int]*scope.Decimal{44: o.Price, 99: o.StopPx, 38: o.OrderQty, 152: o.CashOrderQty, 132: o.BidPx, 133: o.OfferPx, 134: o.BidSize, 135: o.OfferSize} {
		if d != nil {
			out[tag] = d.String()
		} else {
			out[tag] = ""
		}
	}
	return out
}

func differs(format string, a ...any) error { return fmt.Errorf(format, a...) }

// Agrees compares the message with an action, field by field (check 10 of
// docs/protocol.md): every field of the message is one of the action's with the same
// value, or one that the profile leaves free, and every field of the order stands
// in the message or is implied. Values are compared as text: 61.5 is not 61.50.
func (m *Message) Agrees(a *scope.Action, p *Profile) error {
	if p == nil {
		p = new(Profile)
	}
	kind, ok := kinds[m.MsgType]
	if !ok || kind != a.Kind || a.Order == nil {
		return differs("the message has MsgType %.8q, the action is %s", m.MsgType, a.Kind)
	}
	want := fieldsOf(a.Order, a.Kind)
	said := make(map[int]bool)
	for i := 0; i < len(m.fields); i++ {
		f := m.fields[i]
		if slices.Contains(rewritten, f.tag) || f.tag == tagMsgType || slices.Contains(p.Free, f.tag) {
			continue
		}
		if f.tag == tagParties {
			if said[f.tag] {
				return differs("tag %d stands twice", f.tag)
			}
			said[f.tag] = true
			n, err := m.parties(i, a.Party)
			if err != nil {
				return err
			}
			i += n
			continue
		}
		if said[f.tag] {
			return differs("tag %d stands twice", f.tag)
		}
		said[f.tag] = true
		if err := agrees(f, a, want); err != nil {
			return err
		}
	}
	for _, tag := range slices.Sorted(maps.Keys(want)) {
		if want[tag] == "" || said[tag] {
			continue
		}
		implied, ok := p.Implied[tag]
		if !ok {
			return differs("the action has tag %d, the message does not say it", tag)
		}
		if implied != "*" && implied != want[tag] {
			return differs("the message means %.64q for tag %d, the action has %.64q", implied, tag, want[tag])
		}
	}
	return nil
}

// agrees compares one field.
func agrees(f field, a *scope.Action, want map[int]string) error {
	expected, known := want[f.tag]
	switch f.tag {
	case tagTransactTime: // when the order was made; the statement has its own time
		return nil
	case tagHandlInst:
		expected, known = "1", true // automated, no broker in between
	case tagSymbol: // an alias: it must not name another instrument
		if f.value == "[N/A]" {
			return nil
		}
		expected, known = a.Order.SecurityID, true
	case tagSecurityExchange, tagExDestination:
		expected, known = a.Audience, true
	case tagMassCancelType:
		expected, known = "7", a.Kind == scope.OrderMassCancel // all orders
		if a.Order.SecurityID != "" {
			expected = "1" // of an instrument
		}
	case tagExpireTime:
		if t, err := time.Parse(time.RFC3339, expected); err == nil {
			expected = t.UTC().Format("20060102-15:04:05") // FIX UTCTimestamp
		}
	}
	if !known {
		return differs("the message has tag %d, which is not a field of the action", f.tag)
	}
	if f.value != expected {
		return differs("tag %d is %.64q, the action has %.64q", f.tag, f.value, expected)
	}
	return nil
}

// parties compares the group of parties that begins at a field, and returns how
// many fields it has after its count.
func (m *Message) parties(at int, p *scope.Party) (int, error) {
	count, err := strconv.Atoi(m.fields[at].value)
	if err != nil || count < 1 || count > 16 || strconv.Itoa(count) != m.fields[at].value {
		return 0, differs("tag %d is %.16q: 1 to 16 parties are expected", tagParties, m.fields[at].value)
	}
	if p == nil {
		p = new(scope.Party)
	}
	n := 0
	for range count {
		party := make(map[int]string)
		for ; at+1+n < len(m.fields); n++ {
			f := m.fields[at+1+n]
			if f.tag != tagPartyID && f.tag != tagPartyIDSource && f.tag != tagPartyRole && f.tag != tagPartyQualifier || len(party) == 0 && f.tag != tagPartyID || len(party) > 0 && f.tag == tagPartyID {
				break
			}
			if party[f.tag] != "" {
				return 0, differs("tag %d stands twice in a party", f.tag)
			}
			party[f.tag] = f.value
		}
		if party[tagPartyID] == "" || party[tagPartyRole] == "" {
			return 0, differs("tag %d says %d parties, and not so many are there with tags %d and %d", tagParties, count, tagPartyID, tagPartyRole)
		}
		if err := agreesParty(party, p); err != nil {
			return 0, err
		}
	}
	return n, nil
}

// agreesParty compares one party by its PartyRole(452).
func agreesParty(party map[int]string, p *scope.Party) error {
	var person *scope.Person
	expected := ""
	switch party[tagPartyRole] {
	case "3":
		expected = p.Client
	case "12":
		person = p.Execution
	case "122":
		person = p.Decision
	default:
		return differs("a party has the role %.8q, which an action does not have", party[tagPartyRole])
	}
	qualifier := party[tagPartyQualifier]
	if person != nil {
		expected = person.Algorithm + person.Natural // one of them is set
		if qualifier != "" && (qualifier == "22") != (person.Algorithm != "") {
			return differs("the party with the role %s has the qualifier %.8q: 22 is an algorithm", party[tagPartyRole], qualifier)
		}
	}
	if expected == "" || party[tagPartyID] != expected {
		return differs("the party with the role %s is %.64q, the action has %.64q", party[tagPartyRole], party[tagPartyID], expected)
	}
	return nil
}
