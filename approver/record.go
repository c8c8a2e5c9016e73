package approver

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"inkan/attest"
	"inkan/internal/postgres"
	"inkan/scope"
)

// Verdicts of an entry. Anything else is a rule that refuses, a line end, and why.
const (
	verdictPermit    = "permit"
	verdictDeny      = "deny"      // the signer refused it itself
	verdictEvent     = "event"     // it is no action
	verdictUnchecked = "unchecked" // a permit under a certificate that this approver did not know then
)

// Record is an approver's durable record. It is safe for concurrent use, and
// several approvers may share one in PostgreSQL: what one wrote, the others
// count before they authorize.
type Record struct {
	db       *sql.DB
	reads    *sql.DB // for what is read beside the requests
	postgres bool
	stmt     struct{ head, insert, again, move *sql.Stmt } // what each authorization does, prepared

	background context.Context // of what runs beside the requests; ends with the record
	end        context.CancelFunc
	running    sync.WaitGroup

	mu     sync.Mutex
	agents map[string]*ledger
	closed bool
}

// ledger is what is remembered of an agent's entries: those that a limit over
// time can reach.
type ledger struct {
	turn    chan struct{} // holds one while a request is at work
	seen    head          // the end of the entries, as of the last commit that this approver saw
	book    *scope.Book   // counts the entries up to there; nil: to be read
	behind  bool          // others wrote so much that it is read on outside of a transaction
	reading *reading      // nil: nobody reads

	kept    atomic.Uint64 // up to which entry a book is kept
	keeping atomic.Bool   // one is being made
}

func newRecord(db, reads *sql.DB) *Record {
	r := &Record{db: db, reads: reads, agents: make(map[string]*ledger)}
	r.background, r.end = context.WithCancel(context.Background())
	return r
}

// Close closes the record, and keeps what makes the next start faster.
func (r *Record) Close() error {
	r.mu.Lock()
	first, agents := !r.closed, maps.Clone(r.agents)
	r.closed = true
	r.mu.Unlock()
	if first {
		r.end()
		r.running.Wait()
		ctx, cancel := context.WithTimeout(context.Background(), postgres.Patience)
		defer cancel()
		r.keepAll(ctx, agents)
	}
	return errors.Join(r.reads.Close(), r.db.Close())
}

// statements prepares what each authorization does.
func (r *Record) statements(ctx context.Context) error {
	head := "SELECT size, previous, time FROM agent WHERE agent = $1"
	if r.postgres {
		// The settings once more: what is between may have changed them.
		head = "SELECT size, previous, time, current_setting('synchronous_commit'), current_setting('fsync') FROM agent WHERE agent = $1 FOR UPDATE"
	}
	for _, s := range []struct {
		to  **sql.Stmt
		sql string
	}{
		{&r.stmt.head, head},
		{&r.stmt.insert, "INSERT INTO entry(agent, counter, statement, time, verdict, authorized) VALUES($1, $2, $3, $4, $5, $6)"},
		{&r.stmt.again, "UPDATE entry SET authorized = authorized + 1 WHERE agent = $1 AND counter = $2"},
		{&r.stmt.move, "UPDATE agent SET size = $1, previous = $2, time = $3 WHERE agent = $4"},
	} {
		var err error
		if *s.to, err = r.db.PrepareContext(ctx, s.sql); err != nil {
			return err
		}
	}
	return nil
}

func (r *Record) ledger(agent string) *ledger {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.agents[agent]
	if l == nil {
		l = &ledger{turn: make(chan struct{}, 1)}
		r.agents[agent] = l
	}
	return l
}

// entry is one that is looked at in a transaction.
type entry struct {
	bytes  []byte
	st     *scope.Statement
	permit *scope.Permit // nil: it is none of the certificate's scope
	under  *scope.Scope  // of an event: of the certificate that it stands under
}

// entries reads entries that a signer sends, which must be one agent's and
// consecutive.
func (a *Approver) entries(ctx context.Context, list [][]byte, client *x509.Certificate, cred *credential, from netip.Addr, now time.Time) ([]entry, error) {
	agent := cred.action.Agent
	out := make([]entry, 0, len(list)+1)
	for _, b := range list {
		x, err := scope.ParseStatement(b)
		if err != nil {
			return nil, refuse(RuleStatement, "an earlier entry: %v", err)
		}
		switch n := len(out); {
		case x.Agent != agent:
			return nil, refuse(RuleStatement, "entry %d is of %.200s", x.Counter, x.Agent)
		case x.Time.Time.After(now.Add(maxSkew)):
			return nil, refuse(RuleTime, "entry %d is later than this approver's clock", x.Counter)
		case n > 0 && x.Counter != out[n-1].st.Counter+1:
			return nil, refuse(RuleGap, "entry %d follows entry %d", x.Counter, out[n-1].st.Counter)
		}
		e := entry{bytes: b, st: x}
		if x.Decision.Decision == scope.DecisionEvent {
			e.under = a.scopeOf(ctx, x.Decision.Certificate, client, cred, from, now)
		}
		if x.Decision.Decision == scope.DecisionPermit && x.Decision.Certificate == cred.sum {
			e.permit, _ = scope.Check(cred.scope, x.Action(), a.env(x, cred)) // what it refuses is judged so
		}
		out = append(out, e)
	}
	return out, nil
}

// scopeOf is the scope that an event stands under: that of the certificate that
// it names, if the agent could still ask under that one now, else that of the request's. Between
// the two the agent's controllers may have changed.
func (a *Approver) scopeOf(ctx context.Context, named scope.Digest, client *x509.Certificate, cred *credential, from netip.Addr, now time.Time) *scope.Scope {
	if named == cred.sum {
		return cred.scope
	}
	a.mu.RLock()
	var other *credential
	for _, c := range a.known {
		if c.sum == named && c.action.Agent == cred.action.Agent {
			other = c
		}
	}
	a.mu.RUnlock()
	if other == nil || a.current(ctx, client, other, attest.ModeApprover, from, now) != nil {
		return cred.scope
	}
	return other.scope
}

// authorize adds the entries that are new, checks the limits over time as of
// the statement's place, and writes that the statement is authorized. It returns nil
// after the commit. Without a statement it adds the entries alone. committing, if it is not
// nil, is called when nothing is missing but the commit. An error
// that is no *scope.Refusal is the database's.
func (r *Record) authorize(ctx context.Context, cred *credential, entries []entry, st *entry, committing func()) error {
	if st != nil {
		if n := len(entries); n > 0 && st.st.Counter != entries[n-1].st.Counter+1 {
			return refuse(RuleGap, "the entries do not lead to the statement")
		}
		entries = append(entries, *st)
	}
	if len(entries) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, postgres.Patience)
	defer cancel()
	l := r.ledger(cred.action.Agent)
	// After a restart of the database each connection of the pool may be a dead
	// one, which shows when it is used.
	for tries := 0; ; {
		begun := false
		err := r.inTurn(ctx, l, cred, entries, st != nil, func() {
			begun = true
			if committing != nil {
				committing()
			}
		})
		if errors.Is(err, errBehind) {
			continue // what others wrote is read first
		}
		// If the commit was begun, it is not known whether it was done.
		if err == nil || begun || !lost(err) || tries == postgres.MaxConnections || ctx.Err() != nil {
			return err
		}
		tries++
	}
}

// inTurn is one attempt, when it is the request's turn.
func (r *Record) inTurn(ctx context.Context, l *ledger, cred *credential, entries []entry, authorize bool, committing func()) error {
	if err := r.turn(ctx, l, cred.action.Agent); err != nil {
		return err
	}
	defer func() { <-l.turn }()
	err := r.transact(ctx, l, cred, entries, authorize, committing)
	if err == nil {
		r.renew(l, cred.action.Agent, l.seen.size)
	}
	return err
}

// lost says whether a connection that had been made was found dead.
func lost(err error) bool {
	if _, ok := errors.AsType[*pgconn.ConnectError](err); ok {
		return false // there is no server
	}
	if x, ok := errors.AsType[*pgconn.PgError](err); ok {
		return x.Code == "57P01" || x.Code == "57P02" // it shuts down, or another of its processes crashed
	}
	_, network := errors.AsType[*net.OpError](err)
	return network || pgconn.SafeToRetry(err) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

// transact takes entries in one transaction. committing is called right before the
// commit of an authorization.
func (r *Record) transact(ctx context.Context, l *ledger, cred *credential, entries []entry, authorize bool, committing func()) (err error) {
	conn, err := r.db.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close() // back to the pool
	// What was begun is done, also when the signer gives up: else it would have to
	// be counted anew, and each time that signer gave up.
	work, cancel := context.WithTimeout(context.WithoutCancel(ctx), postgres.Patience)
	defer cancel()
	waits := context.AfterFunc(ctx, cancel)
	tx, err := conn.BeginTx(work, nil)
	if err != nil {
		return err
	}
	grown := false
	defer func() {
		if err != nil {
			if rollback := tx.Rollback(); rollback != nil && !errors.Is(rollback, sql.ErrTxDone) {
				err = errors.Join(err, rollback)
			}
			if grown {
				l.book = nil // it may count what was not committed
			}
		}
	}()
	h, err := r.head(work, tx, cred.action.Agent)
	if err != nil {
		return err
	}
	if !waits() {
		return context.Cause(ctx) // it gave up before
	}
	if err := l.catchUp(work, tx, cred.action.Agent, h); err != nil {
		return err
	}
	if first := uint64(entries[0].st.Counter); first > h.size+1 {
		return &scope.Refusal{Rule: RuleGap, Value: fmt.Sprint(h.size), Message: fmt.Sprintf("the approver has %d entries of this agent: entries %d to %d are missing", h.size, h.size+1, first-1)}
	}
	grown, err = r.take(work, tx, l, cred, h, entries, authorize)
	refusal, refused := errors.AsType[*scope.Refusal](err)
	if err != nil && !(refused && grown) {
		return err
	}
	if grown {
		if _, err := tx.StmtContext(work, r.stmt.move).ExecContext(work, int64(h.size), h.previous[:], h.time.UnixMicro(), cred.action.Agent); err != nil {
			return err
		}
	}
	if !refused {
		committing()
	}
	if err := tx.Commit(); err != nil {
		return err
	}
	if l.seen, grown = *h, false; refused {
		return refusal
	}
	return nil
}

// take adds the entries that are new, and authorizes the last one. A refusal ends
// it: what stands before the entry that is refused stays, as if it had been handed
// over alone. grown: there are more entries than before.
func (r *Record) take(ctx context.Context, tx *sql.Tx, l *ledger, cred *credential, h *head, entries []entry, authorize bool) (grown bool, err error) {
	for i, e := range entries {
		asked := authorize && i == len(entries)-1
		var verdict string
		if uint64(e.st.Counter) <= h.size {
			if verdict, err = r.seen(ctx, tx, e); err != nil {
				return grown, err
			}
		} else {
			if err := h.follows(e); err != nil {
				return grown, err
			}
			if err := l.remembers(e); err != nil {
				return grown, err
			}
			if verdict = l.judge(e, cred); !asked || verdict == verdictPermit { // else nothing of it stays
				grown = true
				(&judged{st: e.st, verdict: verdict}).replay(l.book)
				if err := r.append(ctx, tx, h, e, verdict, asked); err != nil {
					return grown, err
				}
				continue
			}
		}
		if !asked {
			continue
		}
		if refusal := refusalOf(verdict); refusal != nil {
			return grown, refusal
		}
		if _, err := tx.StmtContext(ctx, r.stmt.again).ExecContext(ctx, cred.action.Agent, int64(e.st.Counter)); err != nil {
			return grown, err
		}
	}
	return grown, nil
}

// head is the end of an agent's entries.
type head struct {
	size     uint64
	previous [32]byte
	time     time.Time
}

// head reads the agent's head and holds it until the transaction ends, so that
// approvers that share the record take turns.
func (r *Record) head(ctx context.Context, tx *sql.Tx, agent string) (*head, error) {
	h, err := r.readHead(ctx, tx, agent)
	if !errors.Is(err, sql.ErrNoRows) {
		return h, err
	}
	if _, err := tx.ExecContext(ctx, "INSERT INTO agent(agent, size, previous, time) VALUES($1, 0, $2, 0) ON CONFLICT(agent) DO NOTHING", agent, make([]byte, 32)); err != nil {
		return nil, err
	}
	return r.readHead(ctx, tx, agent)
}

func (r *Record) readHead(ctx context.Context, tx *sql.Tx, agent string) (*head, error) {
	var h head
	var previous []byte
	var micros int64
	commit, sync := "on", "on" // the file was opened so
	to := []any{&h.size, &previous, &micros}
	if r.postgres {
		to = append(to, &commit, &sync)
	}
	if err := tx.StmtContext(ctx, r.stmt.head).QueryRowContext(ctx, agent).Scan(to...); err != nil {
		return nil, err
	}
	if err := h.set(previous, micros); err != nil {
		return nil, err
	}
	return &h, postgres.OnDisk(commit, sync)
}

// set takes what stands in the row.
func (h *head) set(previous []byte, micros int64) error {
	if copy(h.previous[:], previous) != 32 || len(previous) != 32 {
		return errors.New("the head's hash does not have 32 bytes")
	}
	h.time = time.UnixMicro(micros).UTC()
	return nil
}

// append writes an entry behind the head, and moves the head.
func (r *Record) append(ctx context.Context, tx *sql.Tx, h *head, e entry, verdict string, authorized bool) error {
	h.size, h.previous, h.time = uint64(e.st.Counter), sha256.Sum256(e.bytes), e.st.Time.Time
	times := 0
	if authorized {
		times = 1
	}
	_, err := tx.StmtContext(ctx, r.stmt.insert).ExecContext(ctx, e.st.Agent, int64(e.st.Counter), e.bytes, e.st.Time.Time.UnixMicro(), verdict, times)
	return err
}

// catchUp counts what other approvers wrote since. A record that does not go on
// from what this approver has seen of it is refused.
func (l *ledger) catchUp(ctx context.Context, tx *sql.Tx, agent string, h *head) error {
	if err := goesOn(ctx, tx, agent, &l.seen, h); err != nil || h.size == l.seen.size {
		return err
	}
	if h.size > l.seen.size+bookBatch {
		l.behind = true
		return errBehind
	}
	x := tally{l.book, l.seen}
	if err := x.count(ctx, tx, agent, h); err != nil {
		l.book = nil
		return err
	}
	l.seen = *h
	return nil
}

// follows: numbered without gaps, naming its predecessor, not earlier than it.
func (h *head) follows(e entry) error {
	switch {
	case uint64(e.st.Counter) != h.size+1:
		return &scope.Refusal{Rule: RuleGap, Value: fmt.Sprint(h.size), Message: fmt.Sprintf("entry %d is expected, %d came", h.size+1, e.st.Counter)}
	case e.st.Previous != scope.Digest(h.previous):
		return refuse(RuleFork, "entry %d names another predecessor than the one that this approver has", e.st.Counter)
	case h.size > 0 && e.st.Time.Time.Before(h.time):
		return refuse(RuleStatement, "entry %d is earlier than its predecessor", e.st.Counter)
	}
	return nil
}

// remembers refuses an entry that does not name what is older than any window and
// still in effect. A start looks for that where the last entries say that it is, so
// one that says something else is not even taken as a refused one.
func (l *ledger) remembers(e entry) error {
	if lasting := l.book.Lasting(); e.st.Controls != lasting {
		return refuse(RuleStatement, "entry %d names %d as the last event before it whose effect lasts, that is %d", e.st.Counter, e.st.Controls, lasting)
	}
	if open := l.book.OpenSince(e.st.Time.Time); e.st.Open != open {
		return refuse(RuleStatement, "entry %d names %d as the oldest order that is open, that is %d", e.st.Counter, e.st.Open, open)
	}
	return nil
}

// judge says what the limits over time make of an entry in its place.
func (l *ledger) judge(e entry, cred *credential) (verdict string) {
	switch {
	case e.st.Decision.Decision == scope.DecisionEvent:
		if refusal := l.book.Admits(e.under, e.st); refusal != nil {
			return string(refusal.Rule) + "\n" + refusal.Message
		}
		return verdictEvent
	case e.st.Decision.Decision != scope.DecisionPermit:
		return verdictDeny
	case e.st.Decision.Certificate != cred.sum:
		return verdictUnchecked
	}
	if e.permit == nil {
		return string(RuleStatement) + "\nit is outside the scope of its certificate"
	}
	out, refusal := l.book.Decide(e.permit, e.st.Time.Time)
	if refusal != nil {
		return string(refusal.Rule) + "\n" + refusal.Message
	}
	if !e.st.States(out) {
		return string(RuleUsage) + "\nit states another policy, or another use of its limits, than the entries before it lead to"
	}
	return verdictPermit
}

// seen returns the verdict on an entry that is there: it must be the same one.
func (r *Record) seen(ctx context.Context, tx *sql.Tx, e entry) (verdict string, err error) {
	var b []byte
	if err := tx.QueryRowContext(ctx, "SELECT statement, verdict FROM entry WHERE agent = $1 AND counter = $2", e.st.Agent, int64(e.st.Counter)).Scan(&b, &verdict); err != nil {
		return "", err
	}
	if !bytes.Equal(b, e.bytes) {
		return "", refuse(RuleFork, "entry %d is another one in this approver's record", e.st.Counter)
	}
	return verdict, nil
}

// refusalOf turns a verdict into a refusal; nil is a permit.
func refusalOf(verdict string) *scope.Refusal {
	switch verdict {
	case verdictPermit:
		return nil
	case verdictUnchecked:
		return &scope.Refusal{Rule: RuleChecked, Message: "the statement was seen before, under a certificate that was not known then: send the action with a new id"}
	}
	if rule, message, ok := strings.Cut(verdict, "\n"); ok {
		return &scope.Refusal{Rule: scope.Rule(rule), Message: message}
	}
	return &scope.Refusal{Rule: RuleStatement, Message: "the entry is a denial or an event"}
}
