// Package audit keeps the durable record of one agent: [Open] a log,
// [Log.Record] what was permitted and [Log.Refuse] what was not, each in one
// commit that is on disk before the call returns. [VerifyFile] checks a log
// offline, with nothing but the file and the CA certificate.
//
// A log is one SQLite file. Its entries are the exact bytes of statements
// (package scope), numbered without gaps from 1, each naming the SHA-256 of the
// one before it, and all of them the leaves of a Merkle tree (RFC 9162, as
// golang.org/x/mod/sumdb/tlog computes it). docs/record.md describes it.
package audit

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"sort"
	"strings"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/tlog"
	"golang.org/x/sys/unix"

	"inkan/internal/sqlite"
	"inkan/scope"
)

// Errors of this package.
var (
	// ErrFailed: a commit failed, so the log takes nothing more. What was
	// acknowledged before is on disk. Free the disk or mend it, then open the log anew.
	ErrFailed = errors.New("the record could not be written, and takes nothing more until it is opened anew")
	// ErrInUse: another process has the log open.
	ErrInUse = errors.New("the record is in use by another process")
	// ErrDamaged: what is in the file does not agree with itself.
	ErrDamaged = errors.New("the record is damaged: keep the file, and see inkan audit verify")
	// ErrConflict: the action id stands in the record with other content.
	ErrConflict = errors.New("the action id was used for another action: make a new id for each action")
	// ErrSpent: a receipt was spent before, or was not made by Record.
	ErrSpent = errors.New("the receipt was spent before or is none")
)

const schemaVersion = 1

const schema = `
CREATE TABLE leaf(
	counter   INTEGER PRIMARY KEY,
	id        TEXT UNIQUE,          -- action id; NULL where the action had none
	payload   BLOB NOT NULL,        -- SHA-256 of the action's canonical form
	statement BLOB NOT NULL
) STRICT;
CREATE TABLE header(
	id   INTEGER PRIMARY KEY,
	text TEXT NOT NULL UNIQUE       -- protected header of signed statements, as it stands in their JWS
) STRICT;
CREATE TABLE signature(
	counter   INTEGER PRIMARY KEY,
	header    INTEGER NOT NULL,
	signature BLOB NOT NULL
) STRICT;
CREATE TABLE hash(
	idx  INTEGER PRIMARY KEY,       -- tlog.StoredHashIndex
	hash BLOB NOT NULL
) STRICT;
CREATE TABLE head(
	one      INTEGER PRIMARY KEY CHECK (one = 1),
	size     INTEGER NOT NULL,
	root     BLOB NOT NULL,
	previous BLOB NOT NULL,         -- SHA-256 of the last statement
	time     INTEGER NOT NULL       -- of the last statement, in microseconds since 1970
) STRICT;
CREATE TABLE certificate(
	sha256 BLOB PRIMARY KEY,
	chain  BLOB NOT NULL            -- DER, leaf first
) STRICT;
CREATE TABLE start(
	sha256   BLOB PRIMARY KEY,
	document BLOB NOT NULL          -- how a process was started, which statements name by digest
) STRICT;
CREATE TABLE checkpoint(
	size INTEGER PRIMARY KEY,       -- of several with one size the latest is kept
	time INTEGER NOT NULL,          -- in microseconds since 1970
	note TEXT NOT NULL              -- signed
) STRICT;
`

// Identity is what stands in a statement beside the action: who signs, under
// which certificate.
type Identity struct {
	Issuer      string    // who issued the certificate
	Agent       string    // SPIFFE ID
	Certificate [32]byte  // SHA-256 of the action certificate
	Scope       [32]byte  // of the scope in it
	Evidence    string    // SHA-256 of the evidence behind it, in hex
	AttestedAt  time.Time // when that was appraised
	Lifetime    time.Duration
	NotAfter    time.Time // end of the certificate; zero: none

	Clock *scope.Clock // what is known of the clock; nil: nothing
	Run   *scope.Run   // how the process that asks was started; nil: not under confinement
}

// Head is the state of a log.
type Head struct {
	Size     uint64
	Root     [32]byte  // of the Merkle tree
	Previous [32]byte  // SHA-256 of the last statement
	Time     time.Time // of the last statement or checkpoint, whichever is later
}

// Options of a log. The zero value is for production.
type Options struct {
	// Now is the clock; nil is time.Now.
	Now func() time.Time
	// Anchor is what the record is bound to; nil: nothing, and an older record
	// in the place of this one is not found out.
	Anchor Anchor
	// Program is the SHA-256 of the executable that writes.
	Program [32]byte
	// BindEvery is how often the record is bound to the anchor while it grows:
	// what was recorded since can be forgotten unnoticed. 0: with every commit, before anything of it is answered.
	BindEvery time.Duration
}

// Log is an agent's record. It is safe for concurrent use: concurrent calls
// share one commit.
type Log struct {
	now  func() time.Time
	lock *os.File
	db   *sql.DB
	conn *sql.Conn
	stmt statements

	requests chan *request
	stop     chan struct{}
	stopped  chan struct{}
	once     sync.Once

	mu     sync.RWMutex // guards head and failed for readers
	head   Head
	failed error

	headers map[string]int64 // of signatures, that have a number; the writer's

	edge map[int64]tlog.Hash // the hashes that the next ones are made of; the writer's
	book *scope.Book         // what is used of limits over time; the writer's, derived from the entries
	seen time.Time           // up to which moment the book was asked; the writer's

	anchoring *anchoring // nil: it is bound to nothing
	path      string
	keeper    keeper // of what makes the next start faster
}

type statements struct {
	begin, commit, leaf, header, signature, hash, hashes, head, find, certificate, start, checkpoint, bound, readHash *sql.Stmt
}

// Open opens or makes the log at path. One process has it open at a time
// ([ErrInUse]). A log whose head and entries disagree is refused ([ErrDamaged]).
func Open(ctx context.Context, path string, o Options) (_ *Log, err error) {
	l := &Log{now: o.Now, requests: make(chan *request, 256), stop: make(chan struct{}), stopped: make(chan struct{}), headers: make(map[string]int64), anchoring: newAnchoring(o), path: path}
	if l.now == nil {
		l.now = time.Now
	}
	defer func() {
		if err != nil {
			l.release()
			err = fmt.Errorf("opening the record %s: %w", path, err)
		}
	}()
	if l.lock, err = os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return nil, err
	}
	if err := unix.Flock(int(l.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, ErrInUse
	}
	if l.db, err = sqlite.Open(path); err != nil {
		return nil, err
	}
	if l.conn, err = l.db.Conn(ctx); err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, err
	}
	if err := l.prepare(ctx); err != nil {
		return nil, err
	}
	if err := l.recover(ctx); err != nil {
		return nil, err
	}
	if l.anchoring != nil {
		if err := l.anchoring.examine(ctx, l.conn, l.head); err != nil {
			return nil, err
		}
	}
	go l.write()
	if l.anchoring != nil {
		go l.keepBound()
		if err := l.begin(ctx); err != nil {
			return nil, errors.Join(err, l.Close())
		}
	}
	return l, nil
}

func (l *Log) prepare(ctx context.Context) error {
	var version int
	if err := l.conn.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version); err != nil {
		return err
	}
	switch version {
	case 0:
		if _, err := l.conn.ExecContext(ctx, fmt.Sprintf("BEGIN IMMEDIATE; %s PRAGMA user_version = %d; COMMIT", schema, schemaVersion)); err != nil {
			return err
		}
	case schemaVersion:
	default:
		return fmt.Errorf("it has format %d, this program knows %d", version, schemaVersion)
	}
	if _, err := l.conn.ExecContext(ctx, anchorSchema); err != nil {
		return err
	}
	for _, s := range []struct {
		to  **sql.Stmt
		sql string
	}{
		{&l.stmt.begin, "BEGIN IMMEDIATE"},
		{&l.stmt.commit, "COMMIT"},
		{&l.stmt.leaf, "INSERT INTO leaf(counter, id, payload, statement) VALUES(?, ?, ?, ?)"},
		{&l.stmt.signature, "INSERT OR IGNORE INTO signature(counter, header, signature) VALUES(?, ?, ?)"},
		{&l.stmt.header, "INSERT INTO header(text) VALUES(?) ON CONFLICT(text) DO UPDATE SET text = excluded.text RETURNING id"},
		{&l.stmt.hash, "INSERT INTO hash(idx, hash) VALUES(?, ?)"},
		{&l.stmt.hashes, "INSERT INTO hash(idx, hash) VALUES(?, ?)" + strings.Repeat(", (?, ?)", hashRows-1)},
		{&l.stmt.head, "INSERT INTO head(one, size, root, previous, time) VALUES(1, ?, ?, ?, ?) ON CONFLICT(one) DO UPDATE SET size = excluded.size, root = excluded.root, previous = excluded.previous, time = excluded.time"},
		{&l.stmt.find, "SELECT l.payload, " + entryColumns + " WHERE l.id = ?"},
		{&l.stmt.certificate, "INSERT OR IGNORE INTO certificate(sha256, chain) VALUES(?, ?)"},
		{&l.stmt.start, "INSERT OR IGNORE INTO start(sha256, document) VALUES(?, ?)"},
		{&l.stmt.checkpoint, "INSERT INTO checkpoint(size, time, note) VALUES(?, ?, ?) ON CONFLICT(size) DO UPDATE SET time = excluded.time, note = excluded.note WHERE excluded.time >= time"},
		{&l.stmt.bound, "INSERT OR REPLACE INTO bound(one, origin, value, size, device, resets, restarts, program) VALUES(1, ?, ?, ?, ?, ?, ?, ?)"},
		{&l.stmt.readHash, "SELECT hash FROM hash WHERE idx = ?"},
	} {
		stmt, err := l.conn.PrepareContext(ctx, s.sql)
		if err != nil {
			return err
		}
		*s.to = stmt
	}
	return nil
}

// recover reads the head and holds it against the last entry and the tree.
func (l *Log) recover(ctx context.Context) error {
	head, err := readHead(ctx, l.conn)
	if err != nil {
		return err
	}
	l.head = head
	var count, last uint64
	if err := l.conn.QueryRowContext(ctx, "SELECT count(*), coalesce(max(counter), 0) FROM leaf WHERE counter >= ?", max(int64(head.Size), 1)).Scan(&count, &last); err != nil {
		return err
	}
	if last != head.Size || head.Size > 0 && count != 1 {
		return fmt.Errorf("%w: the head says %d entries, the last one is %d", ErrDamaged, head.Size, last)
	}
	if head.Size > 0 {
		var statement []byte
		if err := l.conn.QueryRowContext(ctx, "SELECT statement FROM leaf WHERE counter = ?", head.Size).Scan(&statement); err != nil {
			return err
		}
		if sha256.Sum256(statement) != head.Previous {
			return fmt.Errorf("%w: entry %d is not the one that the head names", ErrDamaged, head.Size)
		}
	}
	root, err := l.tree(int64(head.Size), nil)
	if err != nil {
		return err
	}
	if head.Size > 0 && root != tlog.Hash(head.Root) {
		return fmt.Errorf("%w: the tree's hashes do not lead to the head's root", ErrDamaged)
	}
	// What was sealed stays true: nothing is earlier than the latest checkpoint.
	var sealed, micros int64
	if err := l.conn.QueryRowContext(ctx, "SELECT coalesce(max(size), 0), coalesce(max(time), 0) FROM checkpoint").Scan(&sealed, &micros); err != nil {
		return err
	}
	if uint64(sealed) > head.Size {
		return fmt.Errorf("%w: a checkpoint was signed over %d entries, %d are there", ErrDamaged, sealed, head.Size)
	}
	if at := time.UnixMicro(micros).UTC(); at.After(head.Time) && micros > 0 {
		l.head.Time = at
	}
	return l.remember(ctx)
}

// remember derives from the entries what the next ones depend on.
func (l *Log) remember(ctx context.Context) error {
	if l.head.Size == 0 {
		l.book = scope.NewBook()
		return nil
	}
	book, from, err := l.bookUpTo(ctx, l.head)
	if errors.Is(err, errNoBook) {
		book, err = l.replay(ctx, l.head)
	}
	if err != nil {
		return err
	}
	l.book = book
	l.keeper.upTo.Store(from)
	return nil
}

// replay counts the entries up to that of a head that can matter: those of the
// longest window, those since the oldest order that is open, and the events whose effect lasts, of
// which each names the one before it. Times do not go back in a record, so the first one is
// found by halving, and a long record costs nothing.
func (l *Log) replay(ctx context.Context, head Head) (*scope.Book, error) {
	last, _, err := l.at(ctx, head.Size)
	if err != nil {
		return nil, err
	}
	oldest := last.Time.Time.Add(-scope.MaxWindow)
	var failed error
	first := uint64(sort.Search(int(head.Size)-1, func(i int) bool {
		st, _, err := l.at(ctx, uint64(i)+1)
		failed = errors.Join(failed, err)
		return err != nil || !st.Time.Time.Before(oldest)
	})) + 1
	if failed != nil {
		return nil, failed
	}
	if last.Open != 0 {
		first = min(first, uint64(last.Open))
	}
	lasting, err := l.lasting(ctx, last)
	if err != nil {
		return nil, err
	}
	book := scope.NewBook()
	for _, st := range lasting {
		if uint64(st.Counter) < first {
			book.Replay(st)
		}
	}
	return book, l.count(ctx, book, first, head.Size)
}

// lasting reads the events whose effect lasts, up to an entry.
func (l *Log) lasting(ctx context.Context, last *scope.Statement) ([]*scope.Statement, error) {
	list, err := scope.LastingEvents(last, func(n scope.Counter) (*scope.Statement, error) {
		st, _, err := l.at(ctx, uint64(n))
		return st, err
	})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return list, nil
}

func readHead(ctx context.Context, q queryer) (Head, error) {
	var h Head
	var root, previous []byte
	var micros int64
	err := q.QueryRowContext(ctx, "SELECT size, root, previous, time FROM head").Scan(&h.Size, &root, &previous, &micros)
	if errors.Is(err, sql.ErrNoRows) {
		return h, nil
	}
	if err != nil {
		return h, err
	}
	if copy(h.Root[:], root) != 32 || copy(h.Previous[:], previous) != 32 {
		return h, fmt.Errorf("%w: the head's hashes do not have 32 bytes", ErrDamaged)
	}
	h.Time = time.UnixMicro(micros).UTC()
	return h, nil
}

// tree returns the root over size entries and renews the edge: the hashes that
// lead to it are the ones that the next entries need.
func (l *Log) tree(size int64, fresh map[int64]tlog.Hash) (tlog.Hash, error) {
	edge := make(map[int64]tlog.Hash)
	root, err := tlog.TreeHash(size, tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		hashes, err := l.readHashes(fresh)(indexes)
		for i := range hashes {
			edge[indexes[i]] = hashes[i]
		}
		return hashes, err
	}))
	if err == nil {
		l.edge = edge
	}
	return root, err
}

func (l *Log) readHashes(fresh map[int64]tlog.Hash) tlog.HashReaderFunc {
	return func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		for i, x := range indexes {
			if h, ok := fresh[x]; ok {
				out[i] = h
				continue
			}
			if h, ok := l.edge[x]; ok {
				out[i] = h
				continue
			}
			var b []byte
			if err := l.stmt.readHash.QueryRow(x).Scan(&b); err != nil {
				return nil, fmt.Errorf("%w: hash %d: %w", ErrDamaged, x, err)
			}
			if copy(out[i][:], b) != tlog.HashSize {
				return nil, fmt.Errorf("%w: hash %d does not have 32 bytes", ErrDamaged, x)
			}
		}
		return out, nil
	}
}

// Head returns the state after the last commit.
func (l *Log) Head() Head {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.head
}

// Err returns [ErrFailed] with its cause after a failed commit, else nil.
func (l *Log) Err() error {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.failed
}

// AddCertificate keeps the certificate chain, leaf first, under which later
// entries are signed, so that an auditor finds it in the file.
func (l *Log) AddCertificate(ctx context.Context, chain []*x509.Certificate) error {
	if len(chain) == 0 {
		return errors.New("record: no certificate")
	}
	var der bytes.Buffer
	for _, c := range chain {
		der.Write(c.Raw)
	}
	sum := sha256.Sum256(chain[0].Raw)
	return l.send(ctx, &request{certificate: sum[:], chain: der.Bytes()}).err
}

// AddStart keeps a start document, which later entries name by its digest.
func (l *Log) AddStart(ctx context.Context, document []byte) error {
	if _, err := scope.ParseStartDocument(document); err != nil {
		return fmt.Errorf("record: %w", err)
	}
	return l.send(ctx, &request{start: document}).err
}

// Close writes what waits and closes the log. A second Close does nothing.
func (l *Log) Close() error {
	l.once.Do(func() {
		if l.anchoring != nil {
			l.endBinding()
		}
		close(l.stop)
	})
	<-l.stopped
	return nil
}

// release frees what Open took. Closing a log that is in order loses nothing:
// all that counts was committed.
func (l *Log) release() {
	if l.conn != nil {
		_ = l.conn.Close()
	}
	if l.db != nil {
		_ = l.db.Close()
	}
	if l.lock != nil {
		_ = l.lock.Close()
	}
}

// decisionOf turns a stored statement back into what Record answered with.
func decisionOf(statement []byte) error {
	st, err := scope.ParseStatement(statement)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if st.Decision.Decision == scope.DecisionDeny {
		return &scope.Refusal{Rule: st.Decision.Rule, Message: st.Decision.Message}
	}
	return nil
}
