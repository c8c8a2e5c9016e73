package scope

import (
	"fmt"
	"slices"
	"time"

	"inkan/internal/strictjson"
)

// EventAcknowledge says that an order has ended at its venue.
const EventAcknowledge Kind = "control.acknowledge"

// Rules of acknowledgements.
const (
	RuleAckUnknown Rule = "acknowledge_unknown" // no order of this name is open at the venue
	RuleAckTime    Rule = "acknowledge_time"    // it is from before the order, or from later than now
)

// MaxAcknowledgement bounds an acknowledgement, in bytes.
const MaxAcknowledgement = 1 << 10

// AckStatus is how an order ended.
type AckStatus string

// The ways in which an order ends.
const (
	AckRejected  AckStatus = "rejected"  // the venue never took it
	AckFilled    AckStatus = "filled"    // wholly
	AckCancelled AckStatus = "cancelled" // by whomever
	AckDone      AckStatus = "done"      // in another way: expired, or replaced by a later one
)

var ackStatuses = []AckStatus{AckRejected, AckFilled, AckCancelled, AckDone}

// ackSkew is how far the clocks of venue and signer may be apart.
const ackSkew = time.Second

// Acknowledgement is what a venue says of an order that has ended. It releases
// what the order counted for limits of open orders, and nothing of a window.
type Acknowledgement struct {
	Venue   string    `json:"venue"`
	ClOrdID string    `json:"ClOrdID"`
	Status  AckStatus `json:"status"`
	Time    Timestamp `json:"time"` // at the venue, UTC
	By      string    `json:"by"`   // who says so, as the signer knows it
}

// ParseAcknowledgement reads an acknowledgement in JSON, without by.
func ParseAcknowledgement(b []byte) (*Acknowledgement, error) {
	var k struct {
		Acknowledgement
		By string `json:"by,omitzero"` // hides the one of the event
	}
	if err := strictjson.Unmarshal(b, MaxAcknowledgement, &k); err != nil {
		return nil, fmt.Errorf("acknowledgement: %w", err)
	}
	if k.By != "" {
		return nil, fmt.Errorf("acknowledgement: by: the signer says who states it")
	}
	k.Acknowledgement.By = "x"
	if err := k.validate(); err != nil {
		return nil, fmt.Errorf("acknowledgement: %w", err)
	}
	k.Acknowledgement.By = ""
	return &k.Acknowledgement, nil
}

func (k *Acknowledgement) validate() error {
	switch {
	case !validVenue(k.Venue):
		return fmt.Errorf("venue %s: a MIC such as XPAR, or lei: and an LEI, is expected", clipped(k.Venue))
	case !validText(k.ClOrdID):
		return fmt.Errorf("ClOrdID: 1 to %d printable ASCII characters without spaces are expected", maxText)
	case !slices.Contains(ackStatuses, k.Status):
		return fmt.Errorf("status %s: one of %s is expected", clipped(string(k.Status)), join(ackStatuses))
	case !validSentence(k.By):
		return fmt.Errorf("by: 1 to %d bytes of printable text are expected", maxReason)
	}
	return nil
}

// Event returns the acknowledgement as an event that someone states.
func (k *Acknowledgement) Event(by string, s *Scope) (*Event, error) {
	said := *k
	said.By = by
	b, err := strictjson.Marshal(&said)
	if err != nil {
		return nil, err
	}
	return NewEvent(EventAcknowledge, string(b), s)
}

func parseAcknowledge(text string) (fact, error) {
	var k Acknowledgement
	if err := canonicalDocument([]byte(text), MaxAcknowledgement, &k); err != nil {
		return nil, err
	}
	return &k, k.validate()
}

func (k *Acknowledgement) admits(b *Book, _ *Scope, st *Statement) *Refusal {
	t := st.Time.Time
	b.open.expire(t.UnixMicro())
	l := b.open.named[orderName{k.Venue, k.ClOrdID}]
	if l == nil {
		return &Refusal{Rule: RuleAckUnknown, Field: "ClOrdID", Value: k.ClOrdID, Message: fmt.Sprintf("no order %s is open at %s", k.ClOrdID, k.Venue)}
	}
	signed := time.UnixMicro(l.at).UTC()
	if k.Time.Time.Before(signed.Add(-ackSkew)) {
		return &Refusal{Rule: RuleAckTime, Field: "time", Value: k.Time.Time.Format(TimeFormat), Limit: signed.Format(TimeFormat), Message: fmt.Sprintf("the order %s was signed later, at %s", k.ClOrdID, signed.Format(TimeFormat))}
	}
	if k.Time.Time.After(t.Add(ackSkew)) {
		return &Refusal{Rule: RuleAckTime, Field: "time", Value: k.Time.Time.Format(TimeFormat), Limit: t.Format(TimeFormat), Message: fmt.Sprintf("it is from after now, %s", t.Format(TimeFormat))}
	}
	return nil
}

func (k *Acknowledgement) apply(b *Book, st *Statement) {
	b.open.expire(st.Time.Time.UnixMicro())
	b.open.end(orderName{k.Venue, k.ClOrdID}, k.Status == AckRejected)
}
