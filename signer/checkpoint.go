package signer

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"time"

	"inkan/audit"
	"inkan/internal/certext"
	"inkan/internal/jws"
	"inkan/internal/problem"
	"inkan/scope"
)

// lastCheckpoint bounds the checkpoint that is signed when the signer stops.
const lastCheckpoint = 10 * time.Second

// Checkpoint is the answer about a record's head.
type Checkpoint struct {
	*audit.Checkpoint
	Note string `json:"note"` // signed: c2sp.org/tlog-checkpoint
}

// Checkpoint has the device sign the head of the agent's record, as it is on
// disk. Whoever asks chooses nothing of what is signed: the record makes the text,
// and its first line keeps it apart from actions.
func (a *Agent) Checkpoint(ctx context.Context) (*Checkpoint, error) {
	a.sealing.Lock()
	defer a.sealing.Unlock()
	cred := a.current.Load()
	if cred == nil {
		return nil, &scope.Refusal{Rule: RuleNoCertificate, Message: "the agent has no certificate yet: see the signer's log"}
	}
	leaf := cred.chain[0]
	if cred.action.Attestation.Mode == certext.ModeApprover {
		return nil, &scope.Refusal{Rule: RuleDevice, Message: "a key in approver mode signs actions alone: the approver has a copy of the record"}
	}
	seal, err := a.log.Seal(ctx, cred.identity)
	if err != nil {
		return nil, err
	}
	if r := cred.refuses(seal.Checkpoint().Time); r != nil {
		return nil, r
	}
	text, err := seal.Spend()
	if err != nil {
		return nil, err
	}
	signature, err := jws.Sign(a.key, text)
	if err == nil {
		err = jws.Verify(leaf.PublicKey, cred.alg, text, signature)
	}
	if err != nil {
		a.logger.ErrorContext(ctx, "the device did not sign the record's head", "agent", a.name, "error", err)
		return nil, &scope.Refusal{Rule: RuleDevice, Message: "the device did not sign the record's head; the signer's log says why", Cause: err}
	}
	note, err := a.log.KeepSeal(ctx, seal, leaf.PublicKey, signature)
	if err != nil {
		return nil, err
	}
	c := seal.Checkpoint()
	return &Checkpoint{&c, note}, nil
}

// checkpoint has a record's head signed, and the device testify to all that it
// signed; that it could not be stands in the log, and the next one is tried in its time.
func (s *Signer) checkpoint(ctx context.Context, a *Agent) {
	s.head(ctx, a)
	if a.testify == nil {
		return
	}
	if err := a.testify(); err != nil && ctx.Err() == nil {
		s.log.WarnContext(ctx, "the device does not testify to its signatures", "agent", a.name, "error", err)
	}
}

func (s *Signer) head(ctx context.Context, a *Agent) {
	if cred := a.current.Load(); cred != nil && cred.action.Attestation.Mode == certext.ModeApprover {
		return
	}
	c, err := a.Checkpoint(ctx)
	if err != nil {
		if ctx.Err() == nil {
			s.log.WarnContext(ctx, "no checkpoint", "agent", a.name, "error", err)
		}
		return
	}
	s.metrics.checkpointAt.WithLabelValues(a.name).Set(float64(c.Time.Unix()))
}

// checkpointAll signs every record's head at its interval until ctx ends.
func (s *Signer) checkpointAll(ctx context.Context) {
	var wg sync.WaitGroup
	for _, a := range s.agents {
		wg.Go(func() {
			tick := time.NewTicker(a.every)
			defer tick.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
					s.checkpoint(ctx, a)
				}
			}
		})
	}
	wg.Wait()
}

// lastCheckpoints signs every record's head when nothing more is asked, so
// that what is left can be verified to its end. A device that hangs does not hold it up.
func (s *Signer) lastCheckpoints(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastCheckpoint)
	defer cancel()
	var wg sync.WaitGroup
	for _, a := range s.agents {
		wg.Go(func() { s.checkpoint(ctx, a) })
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-ctx.Done():
		s.log.WarnContext(ctx, "stopping without a last checkpoint: the device does not answer")
	}
}

// postCheckpoint signs the head now; getCheckpoint shows the latest one.
func (s *Signer) postCheckpoint(w http.ResponseWriter, r *http.Request, a *Agent) {
	if !s.take(w, a) {
		return
	}
	defer func() { <-a.busy }()
	c, err := a.Checkpoint(r.Context())
	if err != nil {
		s.fail(w, err)
		return
	}
	problem.JSON(w, http.StatusOK, c)
}

func (s *Signer) getCheckpoint(w http.ResponseWriter, r *http.Request, a *Agent) {
	note, err := a.log.LatestCheckpoint(r.Context())
	if err != nil {
		s.fail(w, err)
		return
	}
	if note == "" {
		problem.Write(w, problem.Problem{Status: http.StatusNotFound, Detail: "no head of this record was signed yet"})
		return
	}
	c, err := audit.OpenCheckpoint(note)
	if err != nil {
		s.fail(w, err)
		return
	}
	problem.JSON(w, http.StatusOK, Checkpoint{c, note})
}

// take takes one of the agent's places, or says that there is none.
func (s *Signer) take(w http.ResponseWriter, a *Agent) bool {
	select {
	case a.busy <- struct{}{}:
		return true
	default:
		w.Header().Set("Retry-After", "1")
		problem.Write(w, problem.Problem{Status: http.StatusTooManyRequests, Detail: fmt.Sprintf("more than %d requests at a time", cap(a.busy))})
		return false
	}
}
