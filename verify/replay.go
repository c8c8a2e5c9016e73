package verify

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"inkan/scope"
)

// Use is one use of an action, which a receiver found to be good in itself.
type Use struct {
	Key     scope.Digest // SHA-256 of the certificate
	ID      string       // action id
	Counter uint64
	Signed  time.Time
	Until   time.Time     // after this the action is refused for its age
	Skew    time.Duration // how far Signed may be ahead of the receiver's clock
	Agent   string        // SPIFFE ID

	Statement *scope.Statement
	Permit    *scope.Permit // what the receiver's own check of the statement gave

	// The JWS as it arrived: header and payload, and the signature.
	Header             string // base64url
	Payload, Signature []byte
}

func (u *Use) past() past {
	return pastOf(u.Statement, u.Permit.Scope(), scope.UseOf(u.Permit, u.Signed))
}

// ReplayStore remembers what was accepted. Use is one atomic step: it refuses
// what was seen before (check 8), refuses what is outside the limits over time of its scope
// together with what the agent did at this venue before (check 13), and keeps what it
// does not refuse (16). Of two uses of one action, or two of what is left of a limit, exactly
// one succeeds. It refuses with a *Refusal of ReasonReplay, ReasonCounter or ReasonLimits; any
// other error says that the store does not work.
type ReplayStore interface {
	Use(ctx context.Context, u Use, now time.Time) error
}

// NoReplay remembers nothing: for looking at one action, not for acting on it.
type NoReplay struct{}

// Use accepts everything.
func (NoReplay) Use(context.Context, Use, time.Time) error { return nil }

// CounterWindow is how far behind the highest counter of a certificate an
// unseen one is accepted. Orders that are signed at the same time can arrive
// in another order, so "higher than the last" would refuse good ones.
const CounterWindow = 1024

// window is the counters seen of one certificate, as in RFC 4303, section 3.4.3.
type window struct {
	highest uint64
	seen    [CounterWindow / 64]uint64 // bit counter % CounterWindow
	until   time.Time
}

func (w *window) bit(n uint64) (*uint64, uint64) {
	return &w.seen[n%CounterWindow/64], 1 << (n % 64)
}

// check refuses a counter that was seen, or is too far behind.
func (w *window) check(counter uint64) error {
	if err := inWindow(counter, w.highest); err != nil {
		return err
	}
	if word, mask := w.bit(counter); counter <= w.highest && *word&mask != 0 {
		return refuse(ReasonCounter, "counter %d was seen before", counter)
	}
	return nil
}

// use marks a counter that check let pass.
func (w *window) use(counter uint64) {
	if counter > w.highest {
		for n := max(w.highest+1, counter-min(counter, CounterWindow-1)); n < counter; n++ {
			word, mask := w.bit(n)
			*word &^= mask
		}
		w.highest = counter
	}
	word, mask := w.bit(counter)
	*word |= mask
}

// inWindow refuses a counter that is too far behind the highest one, and one
// beyond what a record can have.
func inWindow(counter, highest uint64) error {
	switch {
	case counter > math.MaxInt64:
		return refuse(ReasonCounter, "counter %d is more than a record can have", counter)
	case counter+CounterWindow <= highest:
		return refuse(ReasonCounter, "counter %d is more than %d behind %d", counter, CounterWindow, highest)
	}
	return nil
}

// ErrNotRemembered is the cause of a refusal with ReasonReplay of an action that may have
// been accepted before or not: it is from before the store began to remember.
var ErrNotRemembered = errors.New("it is from before the store began to remember")

// MemoryStore is a ReplayStore in memory: for a receiver that is one process,
// and that on its restart refuses what was signed before its start (or Skew after it), and
// counts limits over time from there.
type MemoryStore struct {
	mu      sync.Mutex
	max     int
	started time.Time
	ids     map[string]time.Time
	windows map[scope.Digest]*window
	agents  map[string]*history
	kept    int // actions in agents
	swept   time.Time
}

// NewMemoryStore returns a store for at most max actions: those of the last 25
// hours, which limits over time look back to. now is when it begins to remember.
func NewMemoryStore(max int, now time.Time) *MemoryStore {
	return &MemoryStore{max: max, started: now, ids: make(map[string]time.Time), windows: make(map[scope.Digest]*window), agents: make(map[string]*history)}
}

// Use implements ReplayStore. When it is full it fails closed.
func (m *MemoryStore) Use(_ context.Context, u Use, now time.Time) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	// Before its start the store may have accepted what is from up to Skew after it.
	if u.Signed.Before(m.started.Add(u.Skew)) {
		return &Refusal{Reason: ReasonReplay, Detail: fmt.Sprintf("the action was signed at %s, before this receiver began to remember: sign another", u.Signed.Format(scope.TimeFormat)), Cause: ErrNotRemembered}
	}
	if now.Sub(m.swept) > time.Second {
		m.sweep(now)
	}
	if until, ok := m.ids[u.ID]; ok && !now.After(until) {
		return refuse(ReasonReplay, "the action %s was seen before", u.ID)
	}
	if len(m.ids) >= m.max || m.kept >= m.max {
		return fmt.Errorf("%d actions are remembered, and that is the most", m.max)
	}
	w, h := m.windows[u.Key], m.agents[u.Agent]
	if w == nil {
		w = new(window)
	}
	if h == nil {
		h = newHistory()
	}
	if err := w.check(u.Counter); err != nil {
		return err
	}
	count, err := h.admit(u.past(), sha256.Sum256(u.Payload))
	if err != nil {
		return err
	}
	count()
	m.kept++
	m.agents[u.Agent], m.windows[u.Key] = h, w
	w.use(u.Counter)
	w.until = later(w.until, u.Until)
	m.ids[u.ID] = u.Until
	return nil
}

func (m *MemoryStore) sweep(now time.Time) {
	m.swept = now
	for id, until := range m.ids {
		if now.After(until) {
			delete(m.ids, id)
		}
	}
	for agent, h := range m.agents {
		m.kept -= h.forget(now.Add(-remembered))
		if len(h.all) == 0 {
			delete(m.agents, agent)
		}
	}
	for k, w := range m.windows {
		if now.After(w.until.Add(25 * time.Hour)) { // its certificate is over by then
			delete(m.windows, k)
		}
	}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
