package verify

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"net/http"
	"net/netip"

	"inkan/internal/problem"
	"inkan/scope"
)

// Header carries the signed action of an HTTP request.
const Header = "Agent-Action"

type verifiedKey struct{}

// FromContext returns the action that Middleware accepted for a request.
func FromContext(ctx context.Context) (*Verified, bool) {
	v, ok := ctx.Value(verifiedKey{}).(*Verified)
	return v, ok
}

// Middleware lets a request through only with a signed action in the header
// Agent-Action that names the digest of the request's body. Everything else
// is answered with a problem document (RFC 9457) whose reason says why.
// maxBody bounds the body, in bytes.
func (r *Receiver) Middleware(maxBody int64, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		agrees, err := r.match(req)
		if err != nil {
			r.fail(w, req, err)
			return
		}
		values := req.Header.Values(Header)
		if len(values) != 1 {
			r.fail(w, req, refuse(ReasonForm, "%d headers %s, exactly one is expected", len(values), Header))
			return
		}
		from, err := r.address(req)
		if err != nil {
			r.fail(w, req, own(ReasonSourceNetwork, err))
			return
		}
		body, err := io.ReadAll(http.MaxBytesReader(w, req.Body, maxBody))
		if err != nil {
			if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
				r.refused(req, refuse(ReasonBody, "the body is too large"))
				problem.Write(w, problem.Problem{Status: http.StatusRequestEntityTooLarge, Reason: string(ReasonBody), Detail: "the body is too large"})
				return
			}
			r.fail(w, req, &Refusal{Reason: ReasonBody, Detail: "the body could not be read", Cause: err})
			return
		}
		agent, err := r.checkRequest(req, body)
		if err != nil {
			r.fail(w, req, err)
			return
		}
		v, err := r.VerifyArrival(req.Context(), []byte(values[0]), Arrival{Body: &Body{Format: scope.NativeHTTPBody, SHA256: sha256.Sum256(body)}, From: from, Agent: agent, Agrees: agrees(body)})
		if err != nil {
			r.fail(w, req, err)
			return
		}
		req = req.WithContext(context.WithValue(req.Context(), verifiedKey{}, v))
		req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
		req.TransferEncoding = nil
		next.ServeHTTP(w, req)
	})
}

// Messages says what an HTTP request must say beside its action (check 10).
// Match finds that for a request before its body is read; agrees compares the
// body with an action whose signature verified. Both refuse with a *[Refusal].
// Implementations are safe for concurrent use.
type Messages interface {
	Match(req *http.Request) (agrees func(a *scope.Action, body []byte) error, err error)
}

// match returns what compares a body with an action; nil where nothing does.
func (r *Receiver) match(req *http.Request) (func(body []byte) func(*scope.Action) error, error) {
	if r.c.Messages == nil {
		return func([]byte) func(*scope.Action) error { return nil }, nil
	}
	agrees, err := r.c.Messages.Match(req)
	return func(body []byte) func(*scope.Action) error {
		return func(a *scope.Action) error { return agrees(a, body) }
	}, err
}

// address is where a request comes from. What a proxy says wrongly is refused
// whatever the scope; a peer without an address, such as one at a Unix socket, is not known.
func (r *Receiver) address(req *http.Request) (netip.Addr, error) {
	a, err := r.c.Forwarding.Address(req)
	if err != nil && r.c.Forwarding == nil {
		return netip.Addr{}, nil
	}
	return a, err
}

func (r *Receiver) refused(req *http.Request, err error) {
	if r.c.Refused != nil {
		r.c.Refused(req, err)
	}
}

// fail answers with what may be said of err.
func (r *Receiver) fail(w http.ResponseWriter, req *http.Request, err error) {
	r.refused(req, err)
	refusal, ok := errors.AsType[*Refusal](err)
	if !ok {
		problem.Write(w, problem.Problem{Status: http.StatusInternalServerError})
		return
	}
	status := http.StatusForbidden
	switch refusal.Reason {
	case ReasonRoute:
		status = http.StatusNotFound
	case ReasonForm, ReasonHeader, ReasonRequest:
		status = http.StatusBadRequest
	case ReasonCertificate, ReasonExpired, ReasonRevoked, ReasonSignature, ReasonRequestSignature:
		status = http.StatusUnauthorized
	case ReasonRevocation, ReasonKillState, ReasonStore:
		status = http.StatusServiceUnavailable
	case ReasonReplay, ReasonCounter:
		status = http.StatusConflict
	}
	problem.Write(w, problem.Problem{Status: status, Title: "action refused", Reason: string(refusal.Reason), Detail: refusal.Detail})
}
