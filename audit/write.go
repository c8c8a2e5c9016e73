package audit

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/mod/sumdb/tlog"
	"inkan/internal/sqlite"

	"inkan/scope"
)

// maxGroup bounds how many requests share a commit.
const maxGroup = 256

// quiet is after what time without requests signatures that wait are written
// and the write-ahead log is folded into the file.
const quiet = 50 * time.Millisecond

// Receipt shows that a permitted action stands in the record, on disk. Only
// Record makes one, and it is spent once.
type Receipt struct {
	statement []byte
	counter   uint64
	id        string
	repeated  bool
	signed    string
	spent     atomic.Bool
}

// Spend returns the exact bytes to sign, once; then [ErrSpent].
func (r *Receipt) Spend() ([]byte, error) {
	if r == nil || r.statement == nil || !r.spent.CompareAndSwap(false, true) {
		return nil, ErrSpent
	}
	return r.statement, nil
}

// Counter is the entry's number.
func (r *Receipt) Counter() uint64 { return r.counter }

// ID is the action id.
func (r *Receipt) ID() string { return r.id }

// Repeated says that the action was in the record already.
func (r *Receipt) Repeated() bool { return r.repeated }

// Signed is the JWS that Complete stored for the action, or empty.
func (r *Receipt) Signed() string { return r.signed }

// request is one call, as the writer sees it.
type request struct {
	// An entry:
	action   *scope.Action
	payload  [32]byte
	permit   *scope.Permit
	refusal  *scope.Refusal
	event    *scope.Event
	identity Identity
	// or a signature, with the protected header of its JWS:
	counter   uint64
	header    string
	signature []byte
	// or a certificate:
	certificate, chain []byte
	// or a start document:
	start []byte
	// or a question:
	usageOf *scope.Scope
	usage   []scope.Utilisation
	control *scope.Controls
	// or the head to seal, or a seal's signed checkpoint:
	seal *Seal
	note string
	at   time.Time
	// or, alone or with an event, what the record is bound to from now on:
	bound *bound

	receipt *Receipt
	err     error
	done    chan struct{} // nil: nobody waits
}

// Record writes a permitted action: one durable commit, shared with concurrent
// calls. When it returns a receipt, the statement is on disk. A known id with the same
// content gives the same statement again, or the *scope.Refusal that was
// given then; with other content [ErrConflict]. After a failed commit it gives [ErrFailed].
func (l *Log) Record(ctx context.Context, p *scope.Permit, id Identity) (*Receipt, error) {
	if !p.Valid() {
		return nil, errors.New("record: there is no permit")
	}
	payload, err := p.Action().Canonical()
	if err != nil {
		return nil, err
	}
	r := l.send(ctx, &request{action: p.Action(), payload: sha256.Sum256(payload), permit: p, identity: id})
	if r.err == nil {
		r.err = l.ensure(ctx, r.receipt.counter)
	}
	if r.err != nil {
		return nil, r.err
	}
	return r.receipt, nil
}

// Refuse writes a refused action, which is nil where it could not be parsed.
// It returns nil once the refusal is on disk. A known id is not written again.
func (l *Log) Refuse(ctx context.Context, a *scope.Action, r *scope.Refusal, id Identity) error {
	if r == nil || r.Rule == "" {
		return errors.New("record: there is no refusal")
	}
	req := &request{action: a, refusal: r, identity: id}
	if a != nil {
		payload, err := a.Canonical()
		if err != nil {
			return err
		}
		req.payload = sha256.Sum256(payload)
	}
	err := l.send(ctx, req).err
	if _, repeated := errors.AsType[*scope.Refusal](err); repeated {
		return nil
	}
	return err
}

// Event writes an event in one durable commit, and returns its number when it is on
// disk. What may not follow the entries that are there gives a *scope.Refusal,
// and is not written.
func (l *Log) Event(ctx context.Context, e *scope.Event, id Identity) (scope.Counter, error) {
	if e == nil {
		return 0, errors.New("record: there is no event")
	}
	if e.Scope().Hash() != id.Scope {
		return 0, errors.New("record: the event stands under another scope than the certificate's")
	}
	r := l.send(ctx, &request{event: e, identity: id})
	if r.err == nil {
		r.err = l.ensure(ctx, r.counter)
	}
	return scope.Counter(r.counter), r.err
}

// Usage returns what is used now of the limits over time: a certificate's, or
// those of the policy that narrows it.
func (l *Log) Usage(ctx context.Context, s *scope.Scope) ([]scope.Utilisation, error) {
	r := l.send(ctx, &request{usageOf: s})
	return r.usage, r.err
}

// Controls returns what is in force now beside a certificate with a scope.
func (l *Log) Controls(ctx context.Context, s *scope.Scope) (*scope.Controls, error) {
	r := l.send(ctx, &request{usageOf: s})
	return r.control, r.err
}

// later is the later of two moments: time does not go back in a record.
func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// Complete keeps the signed form of a recorded action. It is written with the
// next commit and not waited for: the signature can be made again from the record.
func (l *Log) Complete(r *Receipt, jws string) error {
	if r == nil || r.statement == nil {
		return ErrSpent
	}
	header, rest, _ := strings.Cut(jws, ".")
	payload, text, ok := strings.Cut(rest, ".")
	signature, err := base64.RawURLEncoding.DecodeString(text)
	if !ok || err != nil || header == "" || payload != base64.RawURLEncoding.EncodeToString(r.statement) {
		return fmt.Errorf("record: what was signed is not entry %d", r.counter)
	}
	select {
	case l.requests <- &request{counter: r.counter, header: header, signature: signature}:
		return nil
	case <-l.stop:
		return errors.New("the record was closed")
	}
}

func (l *Log) send(ctx context.Context, r *request) *request {
	r.done = make(chan struct{})
	select {
	case l.requests <- r:
	case <-l.stop:
		return &request{err: errors.New("the record was closed")}
	case <-ctx.Done():
		return &request{err: ctx.Err()}
	}
	// From here on the writer owns r, so its answer is waited for: giving up
	// now would leave the caller not knowing what is on disk.
	select {
	case <-r.done:
		return r
	case <-l.stopped:
		select {
		case <-r.done:
			return r
		default:
			return &request{err: errors.New("the record was closed")}
		}
	}
}

// write is the only writer. It takes all that waits into one commit.
func (l *Log) write() {
	defer close(l.stopped)
	defer l.release()
	var late []*request // signatures that ride with the next commit
	idle := time.NewTimer(quiet)
	defer idle.Stop()
	dirty := false
	for {
		var group []*request
		stopping := false
		select {
		case r := <-l.requests:
			group = append(group, r)
		case <-idle.C:
			if len(late) > 0 {
				l.commit(late)
				late, dirty = nil, true
				idle.Reset(quiet)
			} else if dirty {
				l.checkpoint()
				dirty = false
			}
			continue
		case <-l.stop:
			stopping = true
		}
	more:
		for len(group) < maxGroup {
			select {
			case r := <-l.requests:
				group = append(group, r)
			default:
				break more
			}
		}
		waits := false
		for _, r := range group {
			waits = waits || r.done != nil
		}
		late = append(late, group...)
		if waits || stopping || len(late) >= maxGroup {
			l.commit(late)
			late, dirty = nil, true
		}
		if stopping {
			l.checkpoint()
			l.lastBookOf(l.Head())
			return
		}
		idle.Reset(quiet)
	}
}

// checkpoint copies the write-ahead log into the file, when nobody waits for a
// commit. SQLite does it besides after some thousand pages. Either way the next commit writes over the
// log from its beginning: over space that the file has, a commit takes two thirds
// of what it takes at the end of one that grows. If it cannot, the
// commits stand in the write-ahead log, and the next one is tried.
func (l *Log) checkpoint() {
	if l.Err() == nil {
		_, _ = l.conn.ExecContext(context.Background(), "PRAGMA wal_checkpoint(PASSIVE)")
	}
}

// commit writes a group in one transaction and answers after it is on disk.
// The first error of the database ends the log: a failed sync is not retried,
// since what the disk has is then unknown.
func (l *Log) commit(group []*request) {
	if len(group) == 0 {
		return
	}
	err := l.Err()
	if err == nil {
		var head Head
		grown := false
		if head, err = l.transact(group); err != nil {
			err = fmt.Errorf("%w: %w", ErrFailed, err)
		}
		l.mu.Lock()
		if err != nil {
			l.failed = err
		} else {
			grown = head.Size > l.head.Size
			l.head = head
		}
		l.mu.Unlock()
		for _, r := range group {
			if err == nil && r.seal != nil && r.err == nil {
				l.seal(r.seal)
			}
		}
		if err == nil && grown {
			l.anchoring.recorded()
			l.renewBook(head)
		}
	}
	for _, r := range group {
		if err != nil {
			r.receipt, r.err = nil, err
		}
		if r.done != nil {
			close(r.done)
		}
	}
}

func (l *Log) transact(group []*request) (Head, error) {
	head := l.Head()
	if _, err := l.stmt.begin.Exec(); err != nil {
		return head, err
	}
	fresh := make(map[int64]tlog.Hash) // hashes of this transaction
	grown := false
	refused := l.anchoring.refuses()
	for _, r := range group {
		var err error
		switch {
		case r.usageOf != nil:
			at := later(l.now(), head.Time)
			r.control = l.book.Controls(r.usageOf, at)
			r.usage = l.book.Usage(l.book.Effective(r.usageOf, at), at)
		case r.certificate != nil:
			_, err = l.stmt.certificate.Exec(r.certificate, r.chain)
		case r.start != nil:
			sum := sha256.Sum256(r.start)
			_, err = l.stmt.start.Exec(sum[:], r.start)
		case r.seal != nil: // after the commit
			r.refuse(refused)
		case r.bound != nil && r.event == nil: // below: it binds the whole group
		case refused != nil && r.bound == nil && (r.action != nil || r.event != nil || r.refusal != nil):
			r.refuse(refused)
		case r.note != "":
			_, err = l.stmt.checkpoint.Exec(int64(r.counter), r.at.UnixMicro(), r.note)
		case r.header != "":
			err = l.signature(r)
		default:
			var added bool
			added, err = l.entry(r, &head, fresh)
			grown = grown || added
		}
		if err != nil {
			return head, l.rollback(err)
		}
	}
	if grown {
		root, err := l.tree(int64(head.Size), fresh)
		if err != nil {
			return head, l.rollback(err)
		}
		head.Root = root
		if err := l.writeHashes(l.Head().Size, head.Size, fresh); err != nil {
			return head, l.rollback(err)
		}
		if _, err := l.stmt.head.Exec(int64(head.Size), head.Root[:], head.Previous[:], head.Time.UnixMicro()); err != nil {
			return head, l.rollback(err)
		}
	}
	for _, r := range group {
		if r.bound == nil || r.err != nil {
			continue
		}
		b := r.bound
		if _, err := l.stmt.bound.Exec(int64(b.origin), int64(b.value), int64(head.Size), b.device[:], int64(b.resets), int64(b.restarts), b.program[:]); err != nil {
			return head, l.rollback(err)
		}
		b.size = head.Size
	}
	if _, err := l.stmt.commit.Exec(); err != nil {
		return head, l.rollback(err)
	}
	return head, nil
}

// refuse answers that nothing is recorded now; a nil refusal is none.
func (r *request) refuse(why *scope.Refusal) {
	if why != nil {
		r.err = why
	}
}

// hashRows is how many hashes one statement writes: a group has two for each
// entry, and a statement costs more than a row.
const hashRows = 16

// writeHashes writes the hashes that the tree gained as it grew.
func (l *Log) writeHashes(from, to uint64, fresh map[int64]tlog.Hash) error {
	next, end := tlog.StoredHashIndex(0, int64(from)), tlog.StoredHashIndex(0, int64(to))
	for next < end {
		stmt, n := l.stmt.hash, int64(1)
		if end-next >= hashRows {
			stmt, n = l.stmt.hashes, hashRows
		}
		args := make([]any, 0, 2*hashRows)
		for ; n > 0; n-- {
			h, ok := fresh[next]
			if !ok {
				return fmt.Errorf("hash %d is missing", next)
			}
			args = append(args, next, h[:])
			next++
		}
		if _, err := stmt.Exec(args...); err != nil {
			return err
		}
	}
	return nil
}

// signature writes a signature, and its header if it is new.
func (l *Log) signature(r *request) error {
	id, ok := l.headers[r.header]
	if !ok {
		if err := l.stmt.header.QueryRow(r.header).Scan(&id); err != nil {
			return err
		}
		clear(l.headers) // certificates follow one another: one is current
		l.headers[r.header] = id
	}
	_, err := l.stmt.signature.Exec(int64(r.counter), id, r.signature)
	return err
}

func (l *Log) rollback(err error) error {
	if _, again := l.conn.ExecContext(context.Background(), "ROLLBACK"); again != nil {
		return errors.Join(err, again)
	}
	return err
}

// entry adds one entry, or answers from the one that has the id. Only errors
// of the database are returned; the request's own go to the request.
func (l *Log) entry(r *request, head *Head, fresh map[int64]tlog.Hash) (added bool, err error) {
	statement, st, err := l.statement(r, *head)
	if err != nil {
		r.err = err // it cannot be written down, so it is not done
		return false, nil
	}
	counter := head.Size + 1
	var id any
	if r.action != nil {
		id = r.action.ID
	}
	if _, err := l.stmt.leaf.Exec(int64(counter), id, r.payload[:], statement); err != nil {
		if sqlite.NotUnique(err) {
			return false, l.known(r)
		}
		return false, err
	}
	hashes, err := tlog.StoredHashesForRecordHash(int64(head.Size), tlog.RecordHash(statement), l.readHashes(fresh))
	if err != nil {
		return false, err
	}
	first := tlog.StoredHashIndex(0, int64(head.Size))
	for i, h := range hashes {
		fresh[first+int64(i)] = h
	}
	head.Size, head.Previous, head.Time = counter, sha256.Sum256(statement), st.Time.Time
	l.book.Replay(st)
	switch {
	case r.event != nil:
		r.counter = counter
	case st.Decision.Decision == scope.DecisionPermit:
		r.receipt = &Receipt{statement: statement, counter: counter, id: r.action.ID}
	case r.permit != nil: // what the record holds refused it
		r.err = r.refusal
	}
	return true, nil
}

// permitAt checks a permit again for the moment that its statement will have,
// if that is later than the one it was checked for: another action was
// recorded in between, or the clock was set back.
func (r *request) permitAt(at time.Time) error {
	env := r.permit.Env()
	if !at.After(env.Now) {
		return nil
	}
	if end := r.identity.NotAfter; !end.IsZero() && at.After(end) {
		r.refusal = &scope.Refusal{Rule: scope.RuleCertificateExpired, Message: "the agent's certificate expired at " + end.UTC().Format(time.RFC3339)}
		return nil
	}
	env.Now = at
	p, err := scope.Check(r.permit.Scope(), r.permit.Action(), env)
	if refusal, ok := errors.AsType[*scope.Refusal](err); ok {
		r.refusal = refusal
		return nil
	}
	if err == nil {
		r.permit = p
	}
	return err
}

// known answers a request whose action id stands in the record.
func (l *Log) known(r *request) error {
	var e Entry
	var payload []byte
	if err := e.scan(l.stmt.find.QueryRow(r.action.ID), &payload); err != nil {
		return err
	}
	if !bytes.Equal(payload, r.payload[:]) {
		r.err = ErrConflict
	} else if r.err = decisionOf(e.Statement); r.err == nil {
		r.receipt = &Receipt{statement: e.Statement, counter: e.Counter, id: r.action.ID, repeated: true, signed: e.JWS}
	}
	return nil
}

// statement builds the entry's bytes from the parsed action or the event. Here,
// where the order of all entries is decided, what depends on the entries before it is
// checked: a permit becomes a denial if one of the limits over time refuses it.
func (l *Log) statement(r *request, head Head) (b []byte, s *scope.Statement, err error) {
	at := l.now()
	if r.permit != nil {
		at = r.permit.Env().Now // the moment for which it was checked
	}
	at = later(later(at.UTC().Truncate(time.Microsecond), head.Time), l.seen)
	l.seen = at // the book forgets what is not inside a window any more, though nothing is recorded
	id := &r.identity
	s = &scope.Statement{
		Version: 1, Issuer: id.Issuer, Agent: id.Agent, Counter: scope.Counter(head.Size + 1), Previous: head.Previous,
		Time: scope.Timestamp{Time: at}, Expires: at.Add(id.Lifetime).Unix(), Controls: l.book.Lasting(), Open: l.book.OpenSince(at),
		Decision:    scope.Decision{Decision: scope.DecisionPermit, Certificate: id.Certificate, Scope: id.Scope},
		Attestation: scope.Attestation{Evidence: id.Evidence, Time: scope.Timestamp{Time: id.AttestedAt.UTC().Truncate(time.Microsecond)}},
		Run:         id.Run,
		Clock:       id.Clock,
	}
	if r.event != nil {
		return l.event(r, s)
	}
	if r.permit != nil {
		s.Run, s.Clock = r.permit.Env().Run, r.permit.Env().Clock // those that were checked
	}
	if a := r.action; a != nil {
		s.Audience, s.ID, s.Kind, s.Order, s.Payment, s.Party, s.Native = a.Audience, a.ID, a.Kind, a.Order, a.Payment, a.Party, a.Native
	}
	if r.permit != nil {
		if err := r.permitAt(at); err != nil {
			return nil, nil, err
		}
	}
	if r.permit != nil && r.refusal == nil {
		out, refusal := l.book.Decide(r.permit, at)
		if r.refusal = refusal; refusal == nil {
			r.state(s, out)
		}
	}
	if r.refusal != nil {
		s.Decision.Decision, s.Decision.Rule, s.Decision.Key, s.Decision.Message = scope.DecisionDeny, r.refusal.Rule, r.refusal.Key, r.refusal.Message
	}
	b, err = s.Marshal()
	return b, s, err
}

// state writes into a statement what its permit was checked against.
func (r *request) state(s *scope.Statement, out *scope.Grounds) {
	s.Authorized = r.permit.Env().Authorizations
	d := &s.Decision
	d.Utilisation, d.Policy = out.Utilisation, out.Policy
	if n, ccy, ok := r.permit.Notional(); ok {
		d.Notional = &scope.Amount{Amount: n, Currency: ccy}
	}
	if ref := out.Reference; ref != nil {
		d.Reference = &scope.Reference{Price: ref.Price, Currency: ref.Currency, Source: ref.Source, Time: scope.Timestamp{Time: ref.Time.UTC().Truncate(time.Microsecond)}}
	}
}

// event makes the statement that of an event, if that may follow the entries there are.
func (l *Log) event(r *request, s *scope.Statement) ([]byte, *scope.Statement, error) {
	r.event.On(s)
	b, err := s.Marshal()
	if err != nil {
		return nil, nil, err
	}
	if s, err = scope.ParseStatement(b); err != nil {
		return nil, nil, err
	}
	if refusal := l.book.Admits(r.event.Scope(), s); refusal != nil {
		return nil, nil, refusal
	}
	return b, s, nil
}
