package signer

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"inkan/internal/problem"
	"inkan/internal/strictjson"
	"inkan/scope"
)

// AuthorizationHeader carries what a controller signed for the action in the
// body; it may stand several times.
const AuthorizationHeader = "Agent-Authorization"

// KillRequest is what an operator's process asks for: docs/controls.md.
type KillRequest struct {
	Scope  scope.KillScope `json:"scope"`
	Agent  string          `json:"agent,omitzero"` // name; needed for the scope agent, and allowed for venue
	Venue  string          `json:"venue,omitzero"`
	Reason string          `json:"reason"`
}

// DocumentRequest hands over a document that a controller signed.
type DocumentRequest struct {
	Document string `json:"document"`
}

// Controlled says which entry of an agent's record a control became.
type Controlled struct {
	Agent string        `json:"agent"`
	Event scope.Counter `json:"event"`
}

// control makes a text an event of the agent's record. A refusal stands in the
// record as well.
func (a *Agent) control(ctx context.Context, kind scope.Kind, text string) (scope.Counter, error) {
	cred := a.current.Load()
	if cred == nil {
		return 0, &scope.Refusal{Rule: RuleNoCertificate, Message: "agent " + a.name + " has no certificate yet, so it signs nothing, and its record takes no event: say it again when it has one"}
	}
	e, err := scope.NewEvent(kind, text, cred.scope)
	if err != nil {
		return 0, a.refuse(ctx, nil, &scope.Refusal{Rule: scope.RuleControlForm, Message: err.Error()}, cred, nil)
	}
	n, err := a.log.Event(ctx, e, cred.identity)
	if err != nil {
		return 0, a.refuse(ctx, nil, err, cred, nil)
	}
	a.logger.WarnContext(ctx, "control", "agent", a.name, "kind", kind, "event", uint64(n))
	return n, nil
}

// kill stops the agents that a request is about. It answers when that is on disk.
func (s *Signer) kill(w http.ResponseWriter, r *http.Request) {
	var q KillRequest
	if !readControl(w, r, &q) {
		return
	}
	bad := func(err error) {
		problem.Write(w, problem.Problem{Status: http.StatusBadRequest, Rule: string(scope.RuleControlForm), Detail: "kill: " + err.Error()})
	}
	k := &scope.Kill{Scope: q.Scope, Venue: q.Venue, Reason: q.Reason, By: operatorOf(r)}
	if err := k.Validate(); err != nil {
		bad(err)
		return
	}
	var list []*Agent
	switch {
	case q.Agent == "" && q.Scope == scope.KillAgent, q.Agent != "" && q.Scope == scope.KillFirm:
		bad(errors.New("the scope agent needs an agent, venue may have one, and firm has none"))
		return
	case q.Agent == "":
		for _, ac := range s.config.Agents {
			list = append(list, s.agents[ac.Name])
		}
	case s.agents[q.Agent] == nil:
		bad(fmt.Errorf("agent %.64q: the signer has no agent of this name", q.Agent))
		return
	default:
		list = append(list, s.agents[q.Agent])
	}
	text, err := strictjson.Marshal(k)
	if err != nil {
		s.fail(w, err)
		return
	}
	// Each agent is stopped, whatever happens with another one, and though nobody waits for the answer any more.
	ctx := context.WithoutCancel(r.Context())
	stopped, failed := make([]Controlled, len(list)), make([]error, len(list))
	var wg sync.WaitGroup
	for i, a := range list {
		wg.Go(func() {
			stopped[i].Agent = a.name
			stopped[i].Event, failed[i] = a.control(ctx, scope.EventKill, string(text))
		})
	}
	wg.Wait()
	if errors.Join(failed...) == nil {
		problem.JSON(w, http.StatusOK, stopped)
		return
	}
	if len(list) == 1 {
		s.fail(w, failed[0])
		return
	}
	var done, not []string
	p := problem.Problem{Status: http.StatusServiceUnavailable, Title: "not all agents were stopped"}
	for i, err := range failed {
		r, refused := errors.AsType[*scope.Refusal](err)
		switch {
		case err == nil:
			done = append(done, fmt.Sprintf("%s (entry %d)", stopped[i].Agent, stopped[i].Event))
		case refused:
			p.Rule = string(r.Rule)
			not = append(not, stopped[i].Agent+" ("+r.Message+")")
		default:
			s.log.ErrorContext(ctx, "an agent was not stopped", "agent", stopped[i].Agent, "error", err)
			not = append(not, stopped[i].Agent+" (the signer's log says why)")
		}
	}
	p.Detail = fmt.Sprintf("stopped: %s; not stopped: %s", cmp.Or(strings.Join(done, ", "), "none"), strings.Join(not, ", "))
	problem.Write(w, p)
}

// document serves a document that names its agent by its SPIFFE ID.
func (s *Signer) document(kind scope.Kind, agentOf func(text string) (string, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var q DocumentRequest
		if !readControl(w, r, &q) {
			return
		}
		id, err := agentOf(q.Document)
		if err != nil {
			problem.Write(w, problem.Problem{Status: http.StatusBadRequest, Rule: string(scope.RuleControlForm), Detail: err.Error()})
			return
		}
		for _, a := range s.agents {
			if c := a.current.Load(); c == nil || c.action.Agent != id {
				continue
			}
			n, err := a.control(r.Context(), kind, q.Document)
			if err != nil {
				s.fail(w, err)
				return
			}
			problem.JSON(w, http.StatusOK, Controlled{a.name, n})
			return
		}
		s.fail(w, &scope.Refusal{Rule: scope.RuleControlAgent, Value: id, Message: fmt.Sprintf("the signer has no agent %.200s with a certificate", id)})
	}
}

func policyAgent(text string) (string, error) {
	p, err := scope.ParsePolicy(text)
	if err != nil {
		return "", err
	}
	return p.Agent(), nil
}

func rearmAgent(text string) (string, error) {
	x, err := scope.ParseRearm(text)
	if err != nil {
		return "", err
	}
	return x.Agent, nil
}

// readControl reads the body of a request; it answers if it cannot.
func readControl(w http.ResponseWriter, r *http.Request, v any) bool {
	const most = scope.MaxEvent + 1024
	body, err := io.ReadAll(io.LimitReader(r.Body, most+1))
	if err == nil {
		err = strictjson.Unmarshal(body, most, v)
	}
	if err != nil {
		problem.Write(w, problem.Problem{Status: http.StatusBadRequest, Rule: string(scope.RuleControlForm), Detail: err.Error()})
	}
	return err == nil
}

func operatorOf(r *http.Request) string {
	if p, ok := r.Context().Value(peerKey{}).(*peer); ok && p != nil {
		return fmt.Sprintf("uid %d", p.UID)
	}
	return "an operator"
}

// policyEvery is how often a policy file is looked at.
const policyEvery = time.Second

// watchPolicy takes the agent's policy from its file whenever that changes, until ctx
// ends. What is refused changes nothing: the policy before it stays in effect.
func (a *Agent) watchPolicy(ctx context.Context) {
	if a.policy == "" {
		return
	}
	tick := time.NewTicker(policyEvery)
	defer tick.Stop()
	var last []byte
	var said string       // of the last failure
	var under *credential // it was under this certificate
	tried, again := false, false
	for {
		// A file that cannot be read is one that changed: it is tried again when it can.
		text, err := readPolicy(a.policy)
		cred := a.current.Load()
		changed := err != nil && (last != nil || !tried) || err == nil && !bytes.Equal(text, last)
		if cred != nil && (changed || err == nil && (again && a.log.Finding() == nil || said != "" && cred != under)) {
			tried, last, under = true, text, cred
			if err == nil {
				err = a.takePolicy(ctx, string(text))
			}
			r, refused := errors.AsType[*scope.Refusal](err)
			// What the document says is refused once. What stands in the way of all documents may pass.
			again = err != nil && (!refused || r.Rule == scope.RuleRollback || r.Rule == RuleNoCertificate)
			before := said
			if said = ""; err != nil {
				said = err.Error()
			}
			if said != "" && said != before && ctx.Err() == nil {
				a.logger.ErrorContext(ctx, "the policy file was not taken over", "agent", a.name, "file", a.policy, "error", err)
			}
			a.policyError.Store(&err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func readPolicy(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, scope.MaxEvent+1))
	if err == nil && len(b) == 0 {
		err = errors.New("the file is empty")
	}
	return b, err
}

// takePolicy makes a policy an event, unless it is the one in effect.
func (a *Agent) takePolicy(ctx context.Context, text string) error {
	text = strings.TrimSuffix(text, "\n")
	if p, err := scope.ParsePolicy(text); err == nil {
		now, err := a.log.Controls(ctx, a.current.Load().scope)
		if err != nil {
			return err
		}
		if now.Policy != nil && now.Policy.SHA256 == p.Hash() {
			return nil
		}
	}
	_, err := a.control(ctx, scope.EventPolicy, text)
	return err
}

// watchControls follows the agents' policy files until ctx ends.
func (s *Signer) watchControls(ctx context.Context) {
	done := make(chan struct{}, len(s.agents))
	for _, a := range s.agents {
		go func() { a.watchPolicy(ctx); done <- struct{}{} }()
	}
	for range s.agents {
		<-done
	}
}
