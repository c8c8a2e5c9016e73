package approver

import (
	"bytes"
	"context"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	_ "modernc.org/sqlite" // the driver "sqlite"

	"inkan/scope"
)

// The record is a copy of what each agent's signer wrote down, denials too,
// and what was authorized of it. Both databases know these types.
const schema = `
CREATE TABLE IF NOT EXISTS agent(
	agent    TEXT PRIMARY KEY,
	size     BIGINT NOT NULL,           -- entries
	previous BYTEA NOT NULL,            -- SHA-256 of the last one
	time     BIGINT NOT NULL            -- of the last one, in microseconds since 1970
);
CREATE TABLE IF NOT EXISTS entry(
	agent      TEXT NOT NULL,
	counter    BIGINT NOT NULL,
	statement  BYTEA NOT NULL,
	time       BIGINT NOT NULL,
	verdict    TEXT NOT NULL,           -- of the limits over time: permit, deny, unchecked, or a rule and a message
	authorized BIGINT NOT NULL,         -- how often
	PRIMARY KEY(agent, counter)
);
`

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

	mu     sync.Mutex
	agents map[string]*ledger
}

// ledger is what is remembered of an agent's entries: those that a limit over
// time can reach.
type ledger struct {
	mu   sync.Mutex // held for a whole transaction
	size uint64
	book *scope.Book // nil: to be read
}

// OpenRecord opens or makes the record of one approver in a file.
func OpenRecord(ctx context.Context, path string) (*Record, error) {
	db, err := sql.Open("sqlite", "file:"+path+"?_txlock=immediate&_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)&_pragma=busy_timeout(5000)")
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1)
	r := &Record{db: db, agents: make(map[string]*ledger)}
	if err = r.prepare(ctx); err == nil {
		err = os.Chmod(path, 0o600)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening the record %s: %w", path, err), db.Close())
	}
	return r, nil
}

func (r *Record) prepare(ctx context.Context) error {
	_, err := r.db.ExecContext(ctx, schema)
	return err
}

// Close closes the record.
func (r *Record) Close() error { return r.db.Close() }

func (r *Record) ledger(agent string) *ledger {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.agents[agent]
	if l == nil {
		l = &ledger{}
		r.agents[agent] = l
	}
	return l
}

// entry is one that is looked at in a transaction.
type entry struct {
	bytes []byte
	st    *scope.Statement
}

// parseEntries reads entries that a signer sends, which must be one agent's and
// consecutive.
func parseEntries(list [][]byte, agent string, now time.Time) ([]entry, error) {
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
		out = append(out, entry{b, x})
	}
	return out, nil
}

// authorize adds the entries that are new, checks the limits over time as of
// the statement's place, and writes that the statement is authorized. It returns nil
// after the commit. Without a statement it adds the entries alone.
func (r *Record) authorize(ctx context.Context, cred *credential, entries []entry, st *entry) error {
	if st != nil {
		if n := len(entries); n > 0 && st.st.Counter != entries[n-1].st.Counter+1 {
			return refuse(RuleGap, "the entries do not lead to the statement")
		}
		entries = append(entries, *st)
	}
	if len(entries) == 0 {
		return nil
	}
	l := r.ledger(cred.action.Agent)
	l.mu.Lock()
	defer l.mu.Unlock()
	err := r.transact(ctx, l, cred, entries, st != nil)
	if _, refused := errors.AsType[*scope.Refusal](err); err != nil && !refused {
		return refuse(RuleRecord, "the approver's record does not work: %v", err)
	}
	return err
}

func (r *Record) transact(ctx context.Context, l *ledger, cred *credential, entries []entry, authorize bool) (err error) {
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
	verdict := ""
	for i, e := range entries {
		asked := authorize && i == len(entries)-1
		if uint64(e.st.Counter) <= h.size {
			if verdict, err = r.seen(ctx, tx, e); err != nil {
				return err
			}
			continue
		}
		if err := h.follows(e); err != nil {
			return err
		}
		if verdict = l.judge(e, cred); asked && verdict != verdictPermit {
			break // nothing of the request stays
		}
		grown = true
		l.replay(e.st, verdict)
		h.size, h.previous, h.time = uint64(e.st.Counter), sha256.Sum256(e.bytes), e.st.Time.Time
		l.size = h.size
		if _, err := tx.ExecContext(ctx, "INSERT INTO entry(agent, counter, statement, time, verdict, authorized) VALUES($1, $2, $3, $4, $5, 0)",
			agent, int64(e.st.Counter), e.bytes, e.st.Time.Time.UnixMicro(), verdict); err != nil {
			return err
		}
	}
	if authorize {
		if refusal := refusalOf(verdict); refusal != nil {
			return refusal
		}
		if _, err := tx.ExecContext(ctx, "UPDATE entry SET authorized = authorized + 1 WHERE agent = $1 AND counter = $2", agent, int64(entries[len(entries)-1].st.Counter)); err != nil {
			return err
		}
	}
	if grown {
		if _, err := tx.ExecContext(ctx, "UPDATE agent SET size = $1, previous = $2, time = $3 WHERE agent = $4", int64(h.size), h.previous[:], h.time.UnixMicro(), agent); err != nil {
			return err
		}
	}
	return tx.Commit()
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
	if _, err := tx.ExecContext(ctx, "INSERT INTO agent(agent, size, previous, time) VALUES($1, 0, $2, 0) ON CONFLICT(agent) DO NOTHING", agent, make([]byte, 32)); err != nil {
		return nil, err
	}
	query := "SELECT size, previous, time FROM agent WHERE agent = $1"
	if r.postgres {
		query += " FOR UPDATE"
	}
	var h head
	var previous []byte
	var micros int64
	if err := tx.QueryRowContext(ctx, query, agent).Scan(&h.size, &previous, &micros); err != nil {
		return nil, err
	}
	if copy(h.previous[:], previous) != 32 {
		return nil, errors.New("the head's hash does not have 32 bytes")
	}
	h.time = time.UnixMicro(micros).UTC()
	return &h, nil
}

// catchUp counts what other approvers wrote since, or at first all that is
// young enough to count, and the events whose effect lasts. It reads backwards,
// so a long record costs nothing.
func (l *ledger) catchUp(ctx context.Context, tx *sql.Tx, agent string, h *head) error {
	if l.book != nil && l.size == h.size {
		return nil
	}
	from := l.size + 1
	if l.book == nil || l.size > h.size { // or an older copy of the record was put in its place
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
			oldest = j.st.Time.Time.Add(-scope.MaxWindow)
		} else if from == 1 && j.st.Time.Time.Before(oldest) && (recent[0].st.Open == 0 || j.st.Counter < recent[0].st.Open) {
			break
		}
		recent = append(recent, j)
	}
	if err := errors.Join(rows.Err(), rows.Close()); err != nil {
		return err
	}
	if from == 1 && len(recent) > 0 {
		if err := l.lasting(ctx, tx, agent, recent[0].st, recent[len(recent)-1].st.Counter); err != nil {
			return err
		}
	}
	for _, j := range slices.Backward(recent) {
		l.replay(j.st, j.verdict)
	}
	l.size = h.size
	return nil
}

// judged is an entry that was judged before.
type judged struct {
	st      *scope.Statement
	verdict string
}

func (j *judged) scan(row interface{ Scan(...any) error }) error {
	var b []byte
	if err := row.Scan(&b, &j.verdict); err != nil {
		return err
	}
	var err error
	j.st, err = scope.ParseStatement(b)
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
	use := scope.UseOfStatement(e.st)
	if refusal := l.book.Check(cred.scope, use); refusal != nil {
		return string(refusal.Rule) + "\n" + refusal.Message
	}
	if !slices.Equal(l.book.Utilisation(cred.scope, use), e.st.Decision.Utilisation) {
		return string(RuleUsage) + "\nit states another use of its limits than the entries before it lead to"
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
