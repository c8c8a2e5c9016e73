package approver

import (
	"bytes"
	"context"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

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
	postgres bool
	stmt     struct{ head, insert, again, move *sql.Stmt } // what each authorization does, prepared

	mu     sync.Mutex
	agents map[string]*ledger
}

// ledger is what is remembered of an agent's entries: those that a limit over
// time can reach.
type ledger struct {
	turn chan struct{} // holds one while a request is at work
	seen head          // the end of the entries, as of the last commit that this approver saw
	book *scope.Book   // counts the entries up to there; nil: to be read
}

// Close closes the record.
func (r *Record) Close() error { return r.db.Close() }

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
}

// entries reads entries that a signer sends, which must be one agent's and
// consecutive.
func (a *Approver) entries(list [][]byte, cred *credential, now time.Time) ([]entry, error) {
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
		if x.Decision.Decision == scope.DecisionPermit && x.Decision.Certificate == cred.sum {
			e.permit, _ = scope.Check(cred.scope, x.Action(), a.env(x, cred)) // what it refuses is judged so
		}
		out = append(out, e)
	}
	return out, nil
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
	select {
	case l.turn <- struct{}{}:
		defer func() { <-l.turn }()
	case <-ctx.Done():
		return fmt.Errorf("waiting for other requests of the agent: %w", ctx.Err())
	}
	// After a restart of the database each connection of the pool may be a dead
	// one, which shows when it is used.
	for tries := 0; ; tries++ {
		begun := false
		err := r.transact(ctx, l, cred, entries, st != nil, func() {
			begun = true
			if committing != nil {
				committing()
			}
		})
		// If the commit was begun, it is not known whether it was done.
		if err == nil || begun || !lost(err) || tries == postgres.MaxConnections || ctx.Err() != nil {
			return err
		}
	}
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

// transact is one attempt. committing is called right before the commit.
func (r *Record) transact(ctx context.Context, l *ledger, cred *credential, entries []entry, authorize bool, committing func()) (err error) {
	tx, err := r.db.BeginTx(ctx, nil)
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
	agent := cred.action.Agent
	h, err := r.head(ctx, tx, agent)
	if err != nil {
		return err
	}
	if err := l.catchUp(ctx, tx, agent, h); err != nil {
		l.book = nil
		return err
	}
	if first := uint64(entries[0].st.Counter); first > h.size+1 {
		return &scope.Refusal{Rule: RuleGap, Value: fmt.Sprint(h.size), Message: fmt.Sprintf("the approver has %d entries of this agent: entries %d to %d are missing", h.size, h.size+1, first-1)}
	}
	for i, e := range entries {
		asked := authorize && i == len(entries)-1
		var verdict string
		if uint64(e.st.Counter) <= h.size {
			if verdict, err = r.seen(ctx, tx, e); err != nil {
				return err
			}
		} else {
			if err := h.follows(e); err != nil {
				return err
			}
			if verdict = l.judge(e, cred); !asked || verdict == verdictPermit { // else nothing of the request stays
				grown = true
				l.replay(e.st, verdict)
				if err := r.append(ctx, tx, h, e, verdict, asked); err != nil {
					return err
				}
				continue
			}
		}
		if !asked {
			continue
		}
		if refusal := refusalOf(verdict); refusal != nil {
			return refusal
		}
		if _, err := tx.StmtContext(ctx, r.stmt.again).ExecContext(ctx, agent, int64(e.st.Counter)); err != nil {
			return err
		}
	}
	if grown {
		if _, err := tx.StmtContext(ctx, r.stmt.move).ExecContext(ctx, int64(h.size), h.previous[:], h.time.UnixMicro(), agent); err != nil {
			return err
		}
	}
	committing()
	if err := tx.Commit(); err != nil {
		return err
	}
	l.seen = *h
	return nil
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
	if copy(h.previous[:], previous) != 32 || len(previous) != 32 {
		return nil, errors.New("the head's hash does not have 32 bytes")
	}
	h.time = time.UnixMicro(micros).UTC()
	return &h, postgres.OnDisk(commit, sync)
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

// catchUp counts what other approvers wrote since, or at first all that is
// young enough to count, and the events whose effect lasts. It reads backwards,
// so a long record costs nothing. A record that does not go on from what this
// approver has seen of it is refused: an older state of it was put in its place.
func (l *ledger) catchUp(ctx context.Context, tx *sql.Tx, agent string, h *head) error {
	back := func() error {
		return refuse(RuleRecord, "the approver's record went back: this approver has seen %d entries of %.200s, now it has others or fewer; when it is known why, restart the approver", l.seen.size, agent)
	}
	switch {
	case h.size < l.seen.size, h.size == l.seen.size && h.previous != l.seen.previous:
		return back()
	case h.size == l.seen.size && l.book != nil:
		return nil
	}
	if h.size > l.seen.size && l.seen.size > 0 {
		var j judged
		if err := j.scan(tx.QueryRowContext(ctx, "SELECT statement, verdict FROM entry WHERE agent = $1 AND counter = $2", agent, int64(l.seen.size+1))); err != nil {
			return err
		}
		if [32]byte(j.st.Previous) != l.seen.previous {
			return back()
		}
	}
	from := l.seen.size + 1
	if l.book == nil {
		l.book, from = scope.NewBook(), 1
	}
	rows, err := tx.QueryContext(ctx, "SELECT statement, verdict FROM entry WHERE agent = $1 AND counter >= $2 ORDER BY counter DESC", agent, int64(from))
	if err != nil {
		return err
	}
	defer rows.Close()
	var oldest time.Time
	var recent []judged // the latest first
	for rows.Next() {
		var j judged
		if err := j.scan(rows); err != nil {
			return err
		}
		if len(recent) == 0 {
			if uint64(j.st.Counter) != h.size || j.sum != h.previous {
				return fmt.Errorf("the record of %.200s is damaged: its head is not that of its last entry", agent)
			}
			oldest = j.st.Time.Time.Add(-scope.MaxWindow)
		} else if from == 1 && j.st.Time.Time.Before(oldest) && (recent[0].st.Open == 0 || j.st.Counter < recent[0].st.Open) {
			break
		}
		recent = append(recent, j)
	}
	if err := errors.Join(rows.Err(), rows.Close()); err != nil {
		return err
	}
	if len(recent) == 0 && h.size > 0 {
		return fmt.Errorf("the record of %.200s is damaged: entries are missing", agent)
	}
	if from == 1 && len(recent) > 0 {
		if err := l.lasting(ctx, tx, agent, recent[0].st, recent[len(recent)-1].st.Counter); err != nil {
			return err
		}
	}
	for _, j := range slices.Backward(recent) {
		l.replay(j.st, j.verdict)
	}
	l.seen = *h
	return nil
}

// judged is an entry that was judged before.
type judged struct {
	st      *scope.Statement
	sum     [32]byte
	verdict string
}

func (j *judged) scan(row interface{ Scan(...any) error }) error {
	var b []byte
	if err := row.Scan(&b, &j.verdict); err != nil {
		return err
	}
	var err error
	j.st, err = scope.ParseStatement(b)
	j.sum = sha256.Sum256(b)
	return err
}

// lasting replays the lasting events up to the last entry that stand before first.
func (l *ledger) lasting(ctx context.Context, tx *sql.Tx, agent string, last *scope.Statement, first scope.Counter) error {
	verdicts := make(map[scope.Counter]string)
	events, err := scope.LastingEvents(last, func(n scope.Counter) (*scope.Statement, error) {
		var j judged
		if err := j.scan(tx.QueryRowContext(ctx, "SELECT statement, verdict FROM entry WHERE agent = $1 AND counter = $2", agent, int64(n))); err != nil {
			return nil, err
		}
		verdicts[n] = j.verdict
		return j.st, nil
	})
	if err != nil {
		return err
	}
	for _, st := range events {
		if st.Counter < first {
			l.replay(st, verdicts[st.Counter])
		}
	}
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

// judge says what the limits over time make of an entry in its place.
func (l *ledger) judge(e entry, cred *credential) (verdict string) {
	switch {
	case e.st.Controls != l.book.Lasting():
		return string(RuleStatement) + "\nit names another event before it than there is"
	case e.st.Open != l.book.OpenSince(e.st.Time.Time):
		return string(RuleStatement) + "\nit names another order as the oldest that is open"
	case e.st.Decision.Decision == scope.DecisionEvent:
		if refusal := l.book.Admits(cred.scope, e.st); refusal != nil {
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

// replay counts an entry: every permit of the signer, whether it is ever
// authorized or not, and the events that this approver takes as well.
func (l *ledger) replay(st *scope.Statement, verdict string) {
	if st.Decision.Decision == scope.DecisionEvent && verdict != verdictEvent {
		l.book.Pass(st)
		return
	}
	l.book.Replay(st)
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
