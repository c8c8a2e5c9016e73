package signer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"

	"inkan/internal/problem"
	"inkan/internal/strictjson"
	"inkan/scope"
)

// maxAcknowledgements bounds how many one request has.
const maxAcknowledgements = 64

// Acknowledgements is what an operator's process says of orders that have ended.
type Acknowledgements struct {
	Agent            string            `json:"agent"`
	Acknowledgements []json.RawMessage `json:"acknowledgements"` // in the order in which they take effect: docs/scope.md
}

// Acknowledged is the answer to one of them.
type Acknowledged struct {
	Counter scope.Counter `json:"counter,omitzero"` // of its entry in the record
	Rule    scope.Rule    `json:"rule,omitzero"`    // what refused it
	Detail  string        `json:"detail,omitzero"`
}

// acknowledge records what operators say of orders. Each one stands for itself:
// one that is refused leaves the others.
func (s *Signer) acknowledge(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(io.LimitReader(r.Body, maxAcknowledgements*(scope.MaxAcknowledgement+1)+1024))
	if err != nil {
		problem.Write(w, problem.Problem{Status: http.StatusBadRequest, Detail: "the request's body could not be read"})
		return
	}
	bad := func(format string, a ...any) {
		problem.Write(w, problem.Problem{Status: http.StatusBadRequest, Rule: string(scope.RuleForm), Detail: fmt.Sprintf(format, a...)})
	}
	var q Acknowledgements
	if err := strictjson.Unmarshal(body, maxAcknowledgements*(scope.MaxAcknowledgement+1), &q); err != nil {
		bad("%v", err)
		return
	}
	a := s.agents[q.Agent]
	if a == nil {
		bad("agent %.64q: the signer has no agent of this name", q.Agent)
		return
	}
	if n := len(q.Acknowledgements); n == 0 || n > maxAcknowledgements {
		bad("%d acknowledgements, 1 to %d are expected", n, maxAcknowledgements)
		return
	}
	said := make([]*scope.Acknowledgement, len(q.Acknowledgements))
	for i, text := range q.Acknowledgements {
		if said[i], err = scope.ParseAcknowledgement(text); err != nil {
			bad("%d: %v", i+1, err) // before anything is recorded
			return
		}
	}
	by := "an operator"
	if p, ok := r.Context().Value(peerKey{}).(*peer); ok && p != nil {
		by = fmt.Sprintf("uid %d", p.UID)
	}
	out, err := a.acknowledge(r.Context(), said, by)
	if err != nil {
		s.fail(w, err)
		return
	}
	problem.JSON(w, http.StatusOK, out)
}

// acknowledge records them one after the other: a later one may be of an order
// that an earlier one ends.
func (a *Agent) acknowledge(ctx context.Context, said []*scope.Acknowledgement, by string) ([]Acknowledged, error) {
	cred := a.current.Load()
	if cred == nil {
		return nil, &scope.Refusal{Rule: RuleNoCertificate, Message: "the agent has no certificate yet"}
	}
	out := make([]Acknowledged, len(said))
	for i, k := range said {
		e, err := k.Event(by, cred.scope)
		if err == nil {
			out[i].Counter, err = a.log.Event(ctx, e, cred.identity)
		}
		if r, ok := errors.AsType[*scope.Refusal](err); ok {
			out[i] = Acknowledged{Rule: r.Rule, Detail: r.Message}
		} else if err != nil {
			return nil, err
		}
	}
	return out, nil
}
