// Package binding is how a signed action travels with a venue's own message
// where that is no HTTP request: in a FIX message ([FIX]), and in a WebSocket's
// text frame ([Text]). Both say which bytes of the message were signed for, find the
// action, and have a receiver check it.
//
// What is parsed comes from outside: it is bounded, and has one reading or none.
package binding

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"inkan/scope"
	"inkan/verify"
)

// Accepted is a message whose action a receiver accepted.
type Accepted struct {
	*verify.Verified        // nil of a resend
	Message          []byte // the venue's own message: of FIX as it arrived, of a frame its member message
	// Resend: the message has PossDupFlag=Y, it verifies, and its action was accepted
	// before. The venue has it: it must not be acted on again. It is no replay.
	Resend bool
}

// FIX accepts a FIX message as it arrived from an address, checksum included, or
// says why not; then the error is a *[verify.Refusal].
func FIX(ctx context.Context, r *verify.Receiver, from netip.Addr, message []byte, p *Profile) (*Accepted, error) {
	m, err := ParseFIX(message)
	if err != nil {
		return nil, &verify.Refusal{Reason: verify.ReasonForm, Detail: err.Error()}
	}
	if m.Action == "" {
		return nil, &verify.Refusal{Reason: verify.ReasonForm, Detail: fmt.Sprintf("the message has no signed action (tag %d)", TagAction)}
	}
	v, err := r.VerifyArrival(ctx, []byte(m.Action), verify.Arrival{
		Body: &verify.Body{Format: scope.NativeFIXBody, SHA256: m.Digest()}, From: from,
		Agrees: func(a *scope.Action) error { return m.Agrees(a, p) },
	})
	// The receiver looks last at what it has seen: all else was checked by then. What its store
	// does not remember the venue may not have.
	if m.PossDup && errors.Is(err, &verify.Refusal{Reason: verify.ReasonReplay}) && !errors.Is(err, verify.ErrNotRemembered) {
		return &Accepted{Message: message, Resend: true}, nil
	}
	if err != nil {
		return nil, err
	}
	return &Accepted{Verified: v, Message: message}, nil
}

// Text accepts the text of a WebSocket message that arrived from an address, or says
// why not; then the error is a *[verify.Refusal]. agrees compares the venue's own
// message with the action (check 10 of docs/protocol.md), as message.Route.Agrees does.
func Text(ctx context.Context, r *verify.Receiver, from netip.Addr, text []byte, agrees func(a *scope.Action, message []byte) error) (*Accepted, error) {
	f, err := ParseFrame(text)
	if err != nil {
		return nil, &verify.Refusal{Reason: verify.ReasonForm, Detail: err.Error()}
	}
	message := []byte(f.Message)
	v, err := r.VerifyArrival(ctx, []byte(f.Action), verify.Arrival{
		Body: &verify.Body{Format: scope.NativeWSText, SHA256: TextDigest(message)}, From: from,
		Agrees: func(a *scope.Action) error { return agrees(a, message) },
	})
	if err != nil {
		return nil, err
	}
	return &Accepted{Verified: v, Message: message}, nil
}
