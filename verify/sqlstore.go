package verify

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"inkan/internal/sqlite"
	"inkan/scope"
)

// schemaVersion is of the tables below. Tables of another version are refused.
const schemaVersion = 2

// schema is what a receiver keeps; SQLite and PostgreSQL both know these types.
// Times are in microseconds since 1970.
const schema = `
CREATE TABLE IF NOT EXISTS receiver(
	one     BIGINT PRIMARY KEY CHECK(one = 1),
	version BIGINT NOT NULL
);
CREATE TABLE IF NOT EXISTS received_agent(
	agent TEXT PRIMARY KEY,
	n     BIGINT NOT NULL     -- actions accepted
);
CREATE TABLE IF NOT EXISTS received_certificate(
	key    BYTEA PRIMARY KEY, -- SHA-256 of the certificate
	header TEXT NOT NULL,     -- of its JWS, base64url
	scope  BYTEA NOT NULL,    -- canonical
	until  BIGINT NOT NULL    -- when the first action under it ends
);
CREATE TABLE IF NOT EXISTS received(
	agent     TEXT NOT NULL,
	n         BIGINT NOT NULL, -- in the order of acceptance, from 1
	id        TEXT NOT NULL UNIQUE,
	key       BYTEA NOT NULL,
	counter   BIGINT NOT NULL,
	at        BIGINT NOT NULL, -- of the statement
	until     BIGINT NOT NULL,
	payload   BYTEA NOT NULL,
	signature BYTEA NOT NULL,
	PRIMARY KEY(agent, n),
	UNIQUE(key, counter)
);
CREATE INDEX IF NOT EXISTS received_at ON received(agent, at);
`

// SQLStore is a ReplayStore in a database: it survives restarts and crashes,
// and several receivers may share one. It keeps each action that was accepted for 25
// hours, or longer while it is not too old to be accepted. It is safe for concurrent use.
type SQLStore struct {
	db *sql.DB
	// What a use does, prepared: it is most of what a use costs.
	next, highest, same, certificate, action, old *sql.Stmt

	mu     sync.Mutex
	agents map[string]*shelf
}

// shelf is what this process knows of an agent's rows.
type shelf struct {
	mu      sync.Mutex // held for a whole use: an agent's uses are one after another anyway
	history *history
	n       int64     // the newest row that is in it
	under   [32]byte  // a certificate that is in the database
	swept   time.Time // when old rows were last deleted
}

// OpenSQLiteStore opens or makes a store in a file. Close it.
func OpenSQLiteStore(ctx context.Context, path string) (*SQLStore, error) {
	db, err := sqlite.Open(path)
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1)
	s, err := NewSQLStore(ctx, db)
	if err == nil {
		err = os.Chmod(path, 0o600)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening the replay store %s: %w", path, err), db.Close())
	}
	return s, nil
}

// NewSQLStore makes a store of a database, SQLite or PostgreSQL, which the store
// closes. Transactions of SQLite must begin immediately; what PostgreSQL
// acknowledges must be on disk. Package verify/postgres opens one so.
func NewSQLStore(ctx context.Context, db *sql.DB) (*SQLStore, error) {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return nil, err
	}
	defer func() { _ = tx.Rollback() }() // after Commit it does nothing
	for statement := range strings.SplitSeq(schema, ";\n") {
		if strings.TrimSpace(statement) == "" {
			continue
		}
		if _, err := tx.ExecContext(ctx, statement); err != nil {
			return nil, err
		}
	}
	if _, err := tx.ExecContext(ctx, "INSERT INTO receiver(one, version) VALUES(1, $1) ON CONFLICT(one) DO NOTHING", schemaVersion); err != nil {
		return nil, err
	}
	var version int64
	if err := tx.QueryRowContext(ctx, "SELECT version FROM receiver").Scan(&version); err != nil {
		return nil, err
	}
	if version != schemaVersion {
		return nil, fmt.Errorf("its tables are of version %d, this program knows version %d", version, schemaVersion)
	}
	if err := tx.Commit(); err != nil {
		return nil, err
	}
	s := &SQLStore{db: db, agents: make(map[string]*shelf)}
	for _, x := range []struct {
		to  **sql.Stmt
		sql string
	}{
		{&s.next, "INSERT INTO received_agent(agent, n) VALUES($1, 1) ON CONFLICT(agent) DO UPDATE SET n = received_agent.n + 1 RETURNING n"},
		{&s.highest, "SELECT coalesce(max(counter), 0) FROM received WHERE key = $1"},
		{&s.same, "SELECT count(CASE WHEN id = $1 THEN 1 END), count(*) FROM received WHERE id = $1 OR key = $2 AND counter = $3"},
		{&s.certificate, "INSERT INTO received_certificate(key, header, scope, until) VALUES($1, $2, $3, $4) ON CONFLICT(key) DO NOTHING"},
		{&s.action, "INSERT INTO received(agent, n, id, key, counter, at, until, payload, signature) VALUES($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT DO NOTHING"},
		{&s.old, "DELETE FROM received WHERE agent = $1 AND at < $2 AND until < $3"},
	} {
		if *x.to, err = db.PrepareContext(ctx, x.sql); err != nil {
			return nil, err
		}
	}
	return s, s.sweep(ctx, time.Now())
}

// sweep deletes what is too old, of agents that do not come any more too. A use
// deletes its own agent's; both lock the agent's row first.
func (s *SQLStore) sweep(ctx context.Context, now time.Time) error {
	old := now.Add(-remembered).UnixMicro()
	rows, err := s.db.QueryContext(ctx, "SELECT DISTINCT agent FROM received WHERE at < $1 AND until < $2", old, now.UnixMicro())
	if err != nil {
		return err
	}
	var agents []string
	for rows.Next() {
		var agent string
		if err := rows.Scan(&agent); err != nil {
			return errors.Join(err, rows.Close())
		}
		agents = append(agents, agent)
	}
	if err := errors.Join(rows.Err(), rows.Close()); err != nil {
		return err
	}
	for _, agent := range agents {
		if err := s.sweepAgent(ctx, agent, old, now.UnixMicro()); err != nil {
			return err
		}
	}
	// A certificate lives for a day, so none of these is shown again.
	_, err = s.db.ExecContext(ctx, "DELETE FROM received_certificate WHERE until < $1 AND key NOT IN (SELECT key FROM received)", old)
	return err
}

func (s *SQLStore) sweepAgent(ctx context.Context, agent string, old, now int64) error {
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // after Commit it does nothing
	if _, err := tx.ExecContext(ctx, "UPDATE received_agent SET n = n WHERE agent = $1", agent); err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, "DELETE FROM received WHERE agent = $1 AND at < $2 AND until < $3", agent, old, now); err != nil {
		return err
	}
	return tx.Commit()
}

// Close closes the database.
func (s *SQLStore) Close() error { return s.db.Close() }

// Action returns the JWS of an action that was accepted, as it arrived; empty if
// none has this id, or not any more.
func (s *SQLStore) Action(ctx context.Context, id string) (string, error) {
	var header string
	var payload, signature []byte
	err := s.db.QueryRowContext(ctx, "SELECT c.header, r.payload, r.signature FROM received r JOIN received_certificate c ON c.key = r.key WHERE r.id = $1", id).Scan(&header, &payload, &signature)
	if errors.Is(err, sql.ErrNoRows) {
		return "", nil
	}
	return header + "." + base64.RawURLEncoding.EncodeToString(payload) + "." + base64.RawURLEncoding.EncodeToString(signature), err
}

// useTimeout bounds one use, where the database does not answer.
const useTimeout = 10 * time.Second

// Use implements ReplayStore. What it does not refuse is durable when it returns. Once
// begun it comes to its end whether or not ctx does: a client that leaves in the middle would
// make the store read all again that the agent did.
func (s *SQLStore) Use(ctx context.Context, u Use, now time.Time) error {
	client := ctx
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), useTimeout)
	defer cancel()
	s.mu.Lock()
	a := s.agents[u.Agent]
	if a == nil {
		a = &shelf{history: newHistory()}
		s.agents[u.Agent] = a
	}
	s.mu.Unlock()
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := errors.Join(client.Err(), ctx.Err()); err != nil {
		return err // it waited for its turn in vain
	}

	// What arrives late takes long to judge. Other agents wait for this one's transaction (in
	// SQLite there is one at a time), so it is judged before, by what is known here.
	p, sum := u.past(), sha256.Sum256(u.Payload)
	var count func()
	var refused error
	_, last := a.history.place(&p)
	judged := !last
	if judged {
		if err := s.seen(ctx, func(q *sql.Stmt) *sql.Stmt { return q }, &u); err != nil {
			return err
		}
		count, refused = a.history.admit(p, sum)
	}

	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // after Commit it does nothing
	// The agent's row is locked from here on, so that what follows sees all that
	// other receivers accepted, and none of them accepts anything before the end.
	var n int64
	if err := tx.StmtContext(ctx, s.next).QueryRowContext(ctx, u.Agent).Scan(&n); err != nil {
		return err
	}
	if err := s.seen(ctx, func(q *sql.Stmt) *sql.Stmt { return tx.StmtContext(ctx, q) }, &u); err != nil {
		return err
	}
	if n != a.n+1 {
		if err := a.catchUp(ctx, tx, u.Agent); err != nil {
			return err
		}
		judged = false
	}
	if !judged {
		count, refused = a.history.admit(p, sum)
	}
	if refused != nil {
		return refused
	}
	if now.Sub(a.swept) > time.Minute {
		if _, err := tx.StmtContext(ctx, s.old).ExecContext(ctx, u.Agent, now.Add(-remembered).UnixMicro(), now.UnixMicro()); err != nil {
			return err
		}
	}
	if err := s.keep(ctx, tx, &u, n, a.under == u.Key); err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		// Whether it is there is not known: what is there is read again.
		a.history, a.n = newHistory(), 0
		return err
	}
	count()
	a.n, a.under = n, u.Key
	if now.Sub(a.swept) > time.Minute {
		a.history.forget(now.Add(-remembered))
		a.swept = now
	}
	return nil
}

// seen refuses an id or counter that was seen. The rows of a certificate are
// kept for longer than it lives, so they have its highest counter.
func (s *SQLStore) seen(ctx context.Context, with func(*sql.Stmt) *sql.Stmt, u *Use) error {
	var highest int64
	if err := with(s.highest).QueryRowContext(ctx, u.Key[:]).Scan(&highest); err != nil {
		return err
	}
	var same, any int64
	if err := with(s.same).QueryRowContext(ctx, u.ID, u.Key[:], int64(u.Counter)).Scan(&same, &any); err != nil {
		return err
	}
	switch {
	case same > 0:
		return refuse(ReasonReplay, "the action %s was seen before", u.ID)
	case any > 0:
		return refuse(ReasonCounter, "counter %d was seen before", u.Counter)
	}
	return inWindow(u.Counter, uint64(highest))
}

// catchUp reads what other receivers accepted, or what was before a restart.
func (a *shelf) catchUp(ctx context.Context, tx *sql.Tx, agent string) error {
	rows, err := tx.QueryContext(ctx, "SELECT r.n, r.payload, c.key, c.scope FROM received r JOIN received_certificate c ON c.key = r.key WHERE r.agent = $1 AND r.n > $2 ORDER BY r.at, r.counter", agent, a.n)
	if err != nil {
		return err
	}
	defer func() { _ = rows.Close() }() // its error is in Err
	scopes := make(map[string]*scope.Scope)
	var list []past
	newest := a.n
	for rows.Next() {
		var n int64
		var payload, key, text []byte
		if err := rows.Scan(&n, &payload, &key, &text); err != nil {
			return err
		}
		st, err := scope.ParseStatement(payload)
		if err != nil {
			return fmt.Errorf("row %d of %s: %w", n, agent, err)
		}
		sc := scopes[string(key)]
		if sc == nil {
			if sc, err = scope.ParseCanonical(text); err != nil {
				return fmt.Errorf("row %d of %s: %w", n, agent, err)
			}
			scopes[string(key)] = sc
		}
		list = append(list, pastOf(st, sc, scope.UseOfStatement(st)))
		newest = max(newest, n)
	}
	if err := rows.Err(); err != nil {
		return err
	}
	a.history.add(list)
	a.n = newest
	return nil
}

// keep writes down what is accepted; known: its certificate is there.
func (s *SQLStore) keep(ctx context.Context, tx *sql.Tx, u *Use, n int64, known bool) error {
	until := u.Until.UnixMicro()
	if !known {
		if _, err := tx.StmtContext(ctx, s.certificate).ExecContext(ctx, u.Key[:], u.Header, u.Permit.Scope().Canonical(), until); err != nil {
			return err
		}
	}
	res, err := tx.StmtContext(ctx, s.action).ExecContext(ctx, u.Agent, n, u.ID, u.Key[:], int64(u.Counter), u.Signed.UnixMicro(), until, u.Payload, u.Signature)
	if err != nil {
		return err
	}
	if kept, err := res.RowsAffected(); err != nil || kept != 1 {
		// Another agent's action took the id in this very moment.
		return errors.Join(refuse(ReasonReplay, "the action %s was seen before", u.ID), err)
	}
	return nil
}
