package verify

import (
	"context"
	"database/sql"
	"fmt"
	"sync"
	"time"

	_ "modernc.org/sqlite" // the driver "sqlite"

	"inkan/scope"
)

// Use is one use of an action.
type Use struct {
	Key     scope.Digest // SHA-256 of the certificate
	ID      string       // action id
	Counter uint64
	Signed  time.Time
	Until   time.Time // after this the action is refused for its age
}

// ReplayStore remembers which actions were used. Use must be atomic: of two
// uses of one action exactly one succeeds. It refuses with a *Refusal of
// ReasonReplay or ReasonCounter; any other error says that the store does not work.
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

func (w *window) use(counter uint64) error {
	bit := func(n uint64) (*uint64, uint64) { return &w.seen[n%CounterWindow/64], 1 << (n % 64) }
	switch {
	case counter+CounterWindow <= w.highest:
		return refuse(ReasonCounter, "counter %d is more than %d behind %d", counter, CounterWindow, w.highest)
	case counter > w.highest:
		for n := max(w.highest+1, counter-min(counter, CounterWindow-1)); n < counter; n++ {
			word, mask := bit(n)
			*word &^= mask
		}
		w.highest = counter
		word, mask := bit(counter)
		*word |= mask
		return nil
	}
	word, mask := bit(counter)
	if *word&mask != 0 {
		return refuse(ReasonCounter, "counter %d was seen before", counter)
	}
	*word |= mask
	return nil
}

// MemoryStore is a ReplayStore in memory: for a receiver that is one process,
// and that on its restart refuses what was signed before its start.
type MemoryStore struct {
	mu      sync.Mutex
	max     int
	started time.Time
	ids     map[string]time.Time
	windows map[scope.Digest]*window
	swept   time.Time
}

// NewMemoryStore returns a store for at most max live actions. now is when it
// begins to remember.
func NewMemoryStore(max int, now time.Time) *MemoryStore {
	return &MemoryStore{max: max, started: now, ids: make(map[string]time.Time), windows: make(map[scope.Digest]*window)}
}

// Use implements ReplayStore. When it is full it fails closed.
func (m *MemoryStore) Use(_ context.Context, u Use, now time.Time) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if u.Signed.Before(m.started) {
		return refuse(ReasonReplay, "the action was signed at %s, before this receiver began to remember", u.Signed.Format(scope.TimeFormat))
	}
	if now.Sub(m.swept) > time.Second {
		m.sweep(now)
	}
	if until, ok := m.ids[u.ID]; ok && !now.After(until) {
		return refuse(ReasonReplay, "the action %s was seen before", u.ID)
	}
	if len(m.ids) >= m.max {
		return fmt.Errorf("%d live actions are remembered, and that is the most", m.max)
	}
	w := m.windows[u.Key]
	if w == nil {
		w = new(window)
		m.windows[u.Key] = w
	}
	if err := w.use(u.Counter); err != nil {
		return err
	}
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

// SQLiteStore is a ReplayStore in a file: it survives restarts and crashes.
type SQLiteStore struct{ db *sql.DB }

// OpenSQLiteStore opens or makes the store at path. Close it.
func OpenSQLiteStore(ctx context.Context, path string) (*SQLiteStore, error) {
	db, err := sql.Open("sqlite", "file:"+path+"?_txlock=immediate&_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)&_pragma=busy_timeout(5000)")
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1)
	if _, err := db.ExecContext(ctx, `
		CREATE TABLE IF NOT EXISTS used(id TEXT PRIMARY KEY, key BLOB NOT NULL, counter INTEGER NOT NULL, until INTEGER NOT NULL, UNIQUE(key, counter)) STRICT;
		CREATE INDEX IF NOT EXISTS used_until ON used(until);
		CREATE TABLE IF NOT EXISTS highest(key BLOB PRIMARY KEY, counter INTEGER NOT NULL, until INTEGER NOT NULL) STRICT;`); err != nil {
		_ = db.Close()
		return nil, fmt.Errorf("opening the replay store %s: %w", path, err)
	}
	return &SQLiteStore{db}, nil
}

// Close closes the file.
func (s *SQLiteStore) Close() error { return s.db.Close() }

// Use implements ReplayStore. It is durable when it returns.
func (s *SQLiteStore) Use(ctx context.Context, u Use, now time.Time) error {
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // after Commit it does nothing
	if _, err := tx.ExecContext(ctx, "DELETE FROM used WHERE until < ?", now.Unix()); err != nil {
		return err
	}
	var n int
	if err := tx.QueryRowContext(ctx, "SELECT count(*) FROM used WHERE id = ?", u.ID).Scan(&n); err != nil {
		return err
	}
	if n > 0 {
		return refuse(ReasonReplay, "the action %s was seen before", u.ID)
	}
	var highest int64
	err = tx.QueryRowContext(ctx, "SELECT counter FROM highest WHERE key = ?", u.Key[:]).Scan(&highest)
	if err != nil && err != sql.ErrNoRows {
		return err
	}
	// Rows leave the table with the action's life, so a counter in the window
	// without a row was of an action that is refused for its age.
	if int64(u.Counter)+CounterWindow <= highest {
		return refuse(ReasonCounter, "counter %d is more than %d behind %d", u.Counter, CounterWindow, highest)
	}
	if err := tx.QueryRowContext(ctx, "SELECT count(*) FROM used WHERE key = ? AND counter = ?", u.Key[:], int64(u.Counter)).Scan(&n); err != nil {
		return err
	}
	if n > 0 {
		return refuse(ReasonCounter, "counter %d was seen before", u.Counter)
	}
	if _, err := tx.ExecContext(ctx, "INSERT INTO used(id, key, counter, until) VALUES(?, ?, ?, ?)", u.ID, u.Key[:], int64(u.Counter), u.Until.Unix()+1); err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, "INSERT INTO highest(key, counter, until) VALUES(?, ?, ?) ON CONFLICT(key) DO UPDATE SET counter = max(counter, excluded.counter)", u.Key[:], int64(u.Counter), u.Until.Unix()); err != nil {
		return err
	}
	return tx.Commit()
}
