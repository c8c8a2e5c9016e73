package signer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"inkan/audit"
	"inkan/internal/problem"
	"inkan/internal/strictjson"
	"inkan/scope"
)

// maxRecovery bounds a request to recover, in bytes.
const maxRecovery = 4 << 10

// Recovered is the answer to a recovery.
type Recovered struct {
	Agent   string        `json:"agent"`
	Counter scope.Counter `json:"counter"` // number of its entry
	Cause   scope.Cause   `json:"cause"`
	Found   string        `json:"found"`
}

// anchorOptions say how an agent's record is bound to a counter of the host.
func (s *Signer) anchorOptions(anchor audit.Anchor, every time.Duration) (audit.Options, error) {
	if anchor == nil {
		return audit.Options{}, nil
	}
	program, err := s.digests.of("/proc/self/exe")
	if err != nil {
		return audit.Options{}, fmt.Errorf("the signer's own executable: %w", err)
	}
	return audit.Options{Anchor: anchor, Program: program, BindEvery: every}, nil
}

// Recover takes an agent's record up again about which something was found, for
// an operator, who gives a reason. What may have been forgotten counts as if it
// had used up every limit over time.
func (a *Agent) Recover(ctx context.Context, reason, by string) (*Recovered, error) {
	cred := a.current.Load()
	if cred == nil {
		return nil, &scope.Refusal{Rule: RuleNoCertificate, Message: "the agent has no certificate yet, under which the recovery would be recorded"}
	}
	f := a.log.Finding()
	if f == nil {
		return nil, errNothingFound
	}
	n, err := a.log.Recover(ctx, cred.scope, reason, by, cred.identity)
	if err != nil {
		return nil, err
	}
	a.logger.WarnContext(ctx, "the record was taken up again", "agent", a.name, "cause", f.Cause, "found", f.Found, "reason", reason, "by", by, "entry", n)
	return &Recovered{a.name, n, f.Cause, f.Found}, nil
}

var errNothingFound = errors.New("nothing was found about the record, so there is nothing to recover from")

// settle takes a record up again after a loss of power, which is no operator's
// doing: the record may lack what was recorded last, and is treated so.
func (a *Agent) settle(ctx context.Context) {
	f := a.log.Finding()
	if f == nil {
		return
	}
	if f.Cause != scope.CausePower {
		a.logger.ErrorContext(ctx, "the agent signs nothing", "agent", a.name, "cause", f.Cause, "found", f.Found, "advice", f.Advice())
		return
	}
	if _, err := a.Recover(ctx, "the TPM says that power was lost", "signer"); err != nil && !errors.Is(err, errNothingFound) {
		a.logger.ErrorContext(ctx, "the record was not taken up again", "agent", a.name, "error", err)
	}
}

// recover serves POST /v1/agents/{agent}/recovery, for operators.
func (s *Signer) recover(w http.ResponseWriter, r *http.Request) {
	who := s.operator(w, r)
	if who == nil {
		return
	}
	var req struct {
		Reason string `json:"reason"`
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, maxRecovery+1))
	if err == nil {
		err = strictjson.Unmarshal(body, maxRecovery, &req)
	}
	if err != nil {
		problem.Write(w, problem.Problem{Status: http.StatusBadRequest, Detail: "recovery: " + err.Error()})
		return
	}
	a := s.agents[r.PathValue("agent")]
	if a == nil {
		problem.Write(w, problem.Problem{Status: http.StatusNotFound, Detail: fmt.Sprintf("there is no agent %.64q", r.PathValue("agent"))})
		return
	}
	probe := scope.Recovery{Cause: scope.CauseLost, Found: "x", Reason: req.Reason, By: fmt.Sprintf("uid %d, executable %x", who.UID, who.Executable)}
	if err := probe.Validate(); err != nil {
		problem.Write(w, problem.Problem{Status: http.StatusBadRequest, Detail: "recovery: " + err.Error()})
		return
	}
	var out *Recovered
	if _, jump, _ := s.clock.Now(); jump != nil && a.log.Finding() == nil {
		out, err = s.acceptClock(r.Context(), a, jump, req.Reason, probe.By)
	} else {
		out, err = a.Recover(r.Context(), req.Reason, probe.By)
	}
	if errors.Is(err, errNothingFound) {
		problem.Write(w, problem.Problem{Status: http.StatusConflict, Detail: err.Error()})
		return
	}
	if err != nil {
		s.fail(w, err)
		return
	}
	problem.JSON(w, http.StatusOK, out)
}
