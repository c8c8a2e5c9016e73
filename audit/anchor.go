package audit

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"inkan/scope"
)

// Anchor is a counter outside of the file that nothing sets back, such as one in
// a TPM. The record is bound to it: whoever puts an older file in the place
// of the record is found out, since the counter has gone on. Only one record uses it.
type Anchor interface {
	// Read reads the counter, or gives [ErrNoAnchor].
	Read() (Reading, error)
	// Make makes the counter if there is none.
	Make() error
	// Advance increments the counter from a value to target, and returns its
	// value then. If it has another value than from it does nothing, and moved is false; it is true,
	// even with an error, if the counter may have been incremented. From 0, never incremented, it chooses the value.
	Advance(from, target uint64) (value uint64, moved bool, err error)
}

// ErrNoAnchor: there is no such counter.
var ErrNoAnchor = errors.New("there is no counter for the record")

// Reading is what an anchor says.
type Reading struct {
	Value    uint64   // 0: never incremented
	Device   [32]byte // names the device that it is in
	Resets   uint32   // how often the device was reset, or lost power
	Restarts uint32   // how often it was resumed
	Slack    uint64   // how far it may have jumped up then
}

const lastBinding = 10 * time.Second // for binding what is left when the log is closed

// anchorPatience is for how long nothing is refused while the anchor does not
// answer. Tests change it.
var anchorPatience = 10 * time.Second

const anchorSchema = `
CREATE TABLE IF NOT EXISTS bound(
	one      INTEGER PRIMARY KEY CHECK (one = 1),
	origin   INTEGER NOT NULL,      -- value of the counter before it is advanced
	value    INTEGER NOT NULL,      -- and after
	size     INTEGER NOT NULL,      -- entries that are bound by it
	device   BLOB NOT NULL,         -- names what the counter is in
	resets   INTEGER NOT NULL,
	restarts INTEGER NOT NULL,
	program  BLOB NOT NULL          -- SHA-256 of the executable that wrote it
) STRICT;
`

// bound is the one row of its table. It is on disk before the counter is
// advanced, so the counter is never ahead of it but by a rollback.
type bound struct {
	origin, value    uint64
	size             uint64
	device           [32]byte
	resets, restarts uint32
	program          [32]byte
}

// Finding says why the record may not be all that was recorded.
type Finding struct {
	Cause scope.Cause `json:"cause"`
	Found string      `json:"found"`
}

// Advice says what to do about it.
func (f *Finding) Advice() string {
	switch f.Cause {
	case scope.CauseProgram:
		return "if the signer was updated, have an operator run inkan signer recover; otherwise find out who replaced it"
	case scope.CauseRollback, scope.CauseLost:
		return "put the latest record back and restart the signer, or have an operator run inkan signer recover"
	case scope.CauseShared:
		return "stop the other signer; then have an operator run inkan signer recover"
	case scope.CausePower:
		return "the signer takes it up again by itself when the agent has a certificate"
	}
	return "have an operator run inkan signer recover when they know why"
}

// refusal is what everything is refused with.
func (f *Finding) refusal() *scope.Refusal {
	return &scope.Refusal{Rule: scope.RuleRollback, Field: string(f.Cause), Message: f.Found + ": " + f.Advice()}
}

// Anchoring is the state of a record's binding to its anchor.
type Anchoring struct {
	Bound   bool     `json:"bound"`            // there is an anchor
	Value   uint64   `json:"value,omitzero"`   // of the counter
	Entries uint64   `json:"entries,omitzero"` // that are bound by it; fewer are refused at a start
	Finding *Finding `json:"finding,omitzero"` // why everything is refused
	Error   string   `json:"error,omitzero"`   // why the counter was not advanced
}

// anchoring binds a log to its anchor.
type anchoring struct {
	anchor  Anchor
	program [32]byte
	every   time.Duration
	strict  bool // nothing is answered before it is bound

	finding atomic.Pointer[Finding]
	grown   chan struct{} // something was recorded since
	stop    chan struct{}
	stopped chan struct{}

	mu      sync.Mutex // guards the rest, and whatever asks the anchor
	row     bound      // on disk
	pending bool       // the counter may not be where row says
	tried   bool       // it may have been advanced
	failed  error      // of the last try

	state   atomic.Pointer[Anchoring]
	waiting atomic.Int64 // since when something is not bound, of the process's clock; 0: all is
}

// processBegun makes time differences that no change of the clock disturbs.
var processBegun = time.Now()

func newAnchoring(o Options) *anchoring {
	if o.Anchor == nil {
		return nil
	}
	x := &anchoring{anchor: o.Anchor, program: o.Program, every: o.BindEvery, grown: make(chan struct{}, 1), stop: make(chan struct{}), stopped: make(chan struct{})}
	if x.every == 0 {
		x.strict, x.every = true, time.Second // for what is no permit
	}
	return x
}

func readBound(ctx context.Context, q queryer) (b bound, ok bool, err error) {
	var device, program []byte
	err = q.QueryRowContext(ctx, "SELECT origin, value, size, device, resets, restarts, program FROM bound").Scan(&b.origin, &b.value, &b.size, &device, &b.resets, &b.restarts, &program)
	if errors.Is(err, sql.ErrNoRows) {
		return b, false, nil
	}
	if err == nil && (copy(b.device[:], device) != 32 || copy(b.program[:], program) != 32) {
		err = fmt.Errorf("%w: what it is bound to does not have 32 bytes", ErrDamaged)
	}
	return b, true, err
}

// examine holds the record against the anchor before anything is written.
func (x *anchoring) examine(ctx context.Context, q queryer, head Head) error {
	b, ok, err := readBound(ctx, q)
	if err != nil {
		return err
	}
	r, err := x.anchor.Read()
	missing := errors.Is(err, ErrNoAnchor)
	if err != nil && !missing {
		return err
	}
	if b.size > head.Size {
		return fmt.Errorf("%w: %d entries were bound, %d are there", ErrDamaged, b.size, head.Size)
	}
	x.row, x.pending, x.tried = b, true, true
	f := judge(b, ok, r, missing, head.Size)
	if f == nil && ok && b.program != x.program {
		f = &Finding{scope.CauseProgram, fmt.Sprintf("the executable with the SHA-256 %x has written to the record, this one is %x", b.program[:8], x.program[:8])}
	}
	if f == nil { // it goes on from here
		x.row = bound{origin: r.Value, value: r.Value + 1, device: r.Device, resets: r.Resets, restarts: r.Restarts, program: x.program, size: head.Size}
	}
	x.finding.Store(f)
	x.publish()
	return nil
}

// judge compares what the record says of the counter with the counter.
func judge(b bound, ok bool, r Reading, missing bool, size uint64) *Finding {
	found := func(c scope.Cause, format string, a ...any) *Finding { return &Finding{c, fmt.Sprintf(format, a...)} }
	switch {
	case missing:
		return found(scope.CauseLost, "the TPM has no counter for this record, which enrolment made")
	case !ok && r.Value == 0:
		return nil // both are new, or the record is from before there was a counter
	case !ok && size == 0:
		return found(scope.CauseLost, "the record is empty, and the TPM's counter says that there was one")
	case !ok:
		return found(scope.CauseLost, "the record was never bound to the TPM's counter, which says that there was another")
	case r.Device != b.device:
		return found(scope.CauseDevice, "the record was written on another host, with another TPM")
	case r.Value == 0:
		return found(scope.CauseLost, "the TPM's counter was removed and made again")
	case r.Value >= b.origin && r.Value <= b.value:
		return nil
	case r.Value < b.origin:
		return found(scope.CauseLost, "the TPM's counter is %d, and it was %d before", r.Value, b.origin)
	case r.Resets == b.resets && r.Restarts == b.restarts:
		return found(scope.CauseRollback, "the record is from the counter's value %d, and the TPM's counter is %d: this is an older record", b.value, r.Value)
	case r.Value-b.value <= r.Slack:
		return found(scope.CausePower, "the TPM lost power, and its counter went from %d to %d: what was recorded last cannot be told", b.value, r.Value)
	}
	return found(scope.CauseRollback, "the record is from the counter's value %d, and the TPM's counter is %d, more than a loss of power explains: this is an older record", b.value, r.Value)
}

// refuses says why nothing is recorded now; nil if it is.
func (x *anchoring) refuses() *scope.Refusal {
	if x == nil {
		return nil
	}
	if f := x.finding.Load(); f != nil {
		return f.refusal()
	}
	if since := x.waiting.Load(); since != 0 && time.Since(processBegun)-time.Duration(since) > x.every+anchorPatience {
		return &scope.Refusal{Rule: scope.RuleRollback, Message: "the TPM's counter, to which the record is bound, does not answer: see inkan status"}
	}
	return nil
}

// recorded is called by the writer when entries are on disk that are not bound.
func (x *anchoring) recorded() {
	if x == nil {
		return
	}
	x.waiting.CompareAndSwap(0, max(int64(time.Since(processBegun)), 1))
	select {
	case x.grown <- struct{}{}:
	default:
	}
}

// next is the row that binds what is there; the caller has the mutex, and
// writes it before it advances.
func (x *anchoring) next() bound {
	b := x.row
	b.origin, b.value = x.row.value, x.row.value+1
	return b
}

// advance brings the counter to where the row on disk says; the caller has the mutex.
func (x *anchoring) advance() error {
	defer x.publish()
	value, moved, err := x.anchor.Advance(x.row.origin, x.row.value)
	switch {
	case errors.Is(err, ErrNoAnchor):
		x.finding.Store(&Finding{scope.CauseLost, "the TPM's counter is gone"})
	case err != nil:
		// Only what was begun can be done: otherwise whoever else advances it now would pass for this process.
		x.tried, x.failed = x.tried || moved, err
	case value == x.row.value && (moved || x.tried), moved && x.row.origin == 0:
		x.row.value = value
		x.pending, x.tried, x.failed = false, false, nil
		return nil
	default:
		return x.astray(value)
	}
	return err
}

// astray finds out why the counter is not where this process left it.
func (x *anchoring) astray(value uint64) error {
	f := &Finding{scope.CauseShared, fmt.Sprintf("the TPM's counter is %d, and this process left it at %d: another one writes to a copy of the record", value, x.row.origin)}
	if r, err := x.anchor.Read(); err == nil && (r.Resets != x.row.resets || r.Restarts != x.row.restarts) && r.Value >= x.row.origin && r.Value-x.row.origin <= r.Slack+1 {
		f = judge(x.row, true, r, false, x.row.size)
		if f == nil {
			f = &Finding{scope.CausePower, "the TPM was reset while the record was open"}
		}
	}
	x.finding.Store(f)
	return errors.New(f.Found)
}

// bind binds all that is on disk. The row comes first, so that the counter
// is never ahead of the record by itself.
func (l *Log) bind(ctx context.Context) error {
	l.anchoring.mu.Lock()
	defer l.anchoring.mu.Unlock()
	return l.bindAll(ctx)
}

// ensure binds what is recorded up to an entry, where nothing is answered
// before. Callers that wait here find that the one before them has bound their entries too.
func (l *Log) ensure(ctx context.Context, counter uint64) error {
	x := l.anchoring
	if x == nil || !x.strict {
		return nil
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.pending && x.finding.Load() == nil && x.row.size >= counter {
		return nil
	}
	err := l.bindAll(ctx)
	if err == nil && x.row.size < counter { // what was pending was older
		err = l.bindAll(ctx)
	}
	if _, ok := errors.AsType[*scope.Refusal](err); err != nil && !ok {
		err = &scope.Refusal{Rule: scope.RuleRollback, Message: "recorded, but not signed: the TPM's counter, to which the record is bound, was not advanced: " + err.Error()}
	}
	return err
}

// bindAll is bind for who has the mutex.
func (l *Log) bindAll(ctx context.Context) error {
	x := l.anchoring
	if f := x.finding.Load(); f != nil {
		return f.refusal()
	}
	if !x.pending {
		b := x.next()
		r := l.send(ctx, &request{bound: &b})
		if r.err != nil {
			return r.err
		}
		x.row, x.pending = b, true
	}
	size := x.row.size
	if err := x.advance(); err != nil {
		return err
	}
	x.waiting.Store(0)
	if l.Head().Size > size {
		x.recorded()
	}
	return nil
}

// begin binds the record for the first time of this process, so that another
// one, which has a copy of it, is found out.
func (l *Log) begin(ctx context.Context) error {
	x := l.anchoring
	x.mu.Lock()
	b := x.row
	x.mu.Unlock()
	if x.finding.Load() != nil {
		return nil
	}
	if b.origin == 0 { // never incremented: the TPM chooses the value
		value, _, err := x.anchor.Advance(0, 0)
		if err != nil {
			return err
		}
		b.origin, b.value = value, value+1
	}
	if r := l.send(ctx, &request{bound: &b}); r.err != nil {
		return r.err
	}
	x.mu.Lock()
	x.row, x.pending, x.tried = b, true, false
	x.mu.Unlock()
	if err := l.bind(ctx); x.finding.Load() == nil {
		return err
	}
	return nil // everything is refused
}

// keepBound binds what was recorded, not more often than it has to, until the log is closed.
func (l *Log) keepBound() {
	x := l.anchoring
	defer close(x.stopped)
	pause := time.NewTimer(x.every)
	defer pause.Stop()
	for {
		stopping := false
		select {
		case <-x.stop:
			stopping = true
		case <-pause.C:
			select {
			case <-x.stop:
				stopping = true
			case <-x.grown:
			}
		}
		if stopping && x.waiting.Load() == 0 {
			return
		}
		// A failure stands in the state of the binding, and is tried again.
		if l.bind(context.Background()) != nil && !stopping {
			x.recorded()
		}
		if stopping {
			return
		}
		pause.Reset(x.every)
	}
}

// endBinding binds what is left. An anchor that hangs does not hold it up.
func (l *Log) endBinding() {
	close(l.anchoring.stop)
	select {
	case <-l.anchoring.stopped:
	case <-time.After(lastBinding):
	}
}

// publish shows the state to those who do not want to wait; the caller has the mutex.
func (x *anchoring) publish() {
	a := &Anchoring{Bound: true, Value: x.row.value, Entries: x.row.size, Finding: x.finding.Load()}
	if x.failed != nil {
		a.Error = x.failed.Error()
	}
	x.state.Store(a)
}

// Anchoring returns the state of the record's binding.
func (l *Log) Anchoring() Anchoring {
	if l.anchoring == nil {
		return Anchoring{}
	}
	return *l.anchoring.state.Load()
}

// Finding says why everything is refused; nil if it is not.
func (l *Log) Finding() *Finding {
	if l.anchoring == nil {
		return nil
	}
	return l.anchoring.finding.Load()
}

// Recover takes a record up again about which there was a finding: it writes the
// recovery, which has its cause and what was found, and binds the record to the anchor anew.
// What is not in the record counts as if it had used up every limit over time.
func (l *Log) Recover(ctx context.Context, s *scope.Scope, reason, by string, id Identity) (scope.Counter, error) {
	x := l.anchoring
	if x == nil {
		return 0, errors.New("record: it is bound to no counter, so nothing was found")
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	f := x.finding.Load()
	if f == nil {
		return 0, errors.New("record: nothing was found, so there is nothing to recover from")
	}
	rec := scope.Recovery{Cause: f.Cause, Found: f.Found, Reason: reason, By: by}
	if err := rec.Validate(); err != nil {
		return 0, fmt.Errorf("recovery: %w", err)
	}
	e, err := rec.Event(s)
	if err != nil {
		return 0, err
	}
	r, err := x.anchor.Read()
	if errors.Is(err, ErrNoAnchor) {
		if err = x.anchor.Make(); err == nil {
			r, err = x.anchor.Read()
		}
	}
	if err == nil && r.Value == 0 {
		r.Value, _, err = x.anchor.Advance(0, 0)
	}
	if err != nil {
		return 0, err
	}
	b := bound{origin: r.Value, value: r.Value + 1, device: r.Device, resets: r.Resets, restarts: r.Restarts, program: x.program}
	q := l.send(ctx, &request{event: e, identity: id, bound: &b})
	if q.err != nil {
		return 0, q.err
	}
	x.row, x.pending, x.tried = b, true, false
	if err := x.advance(); err != nil {
		return 0, err
	}
	x.waiting.Store(0)
	x.finding.Store(nil)
	x.publish()
	return scope.Counter(q.counter), nil
}
