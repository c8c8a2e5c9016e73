package audit

import (
	"context"
	"database/sql"
	"encoding/base64"
	"errors"
	"fmt"
	"iter"
	"maps"
	"math"
	"os"
	"slices"
	"strings"

	"inkan/internal/sqlite"
)

// Entry is one entry of a log.
type Entry struct {
	Counter   uint64
	Statement []byte // exact bytes
	JWS       string // empty: it was refused, or its signature is not stored
}

// entryColumns are those that scan takes, and where they come from. A JWS is kept
// in parts: its header is the same for all that one certificate signs, and its
// payload is the statement.
const entryColumns = "l.counter, l.statement, coalesce(h.text, ''), s.signature FROM leaf l LEFT JOIN signature s USING(counter) LEFT JOIN header h ON h.id = s.header"

// scan reads an entry; more columns may stand before its own.
func (e *Entry) scan(row interface{ Scan(...any) error }, before ...any) error {
	var header string
	var signature []byte
	if err := row.Scan(append(before, &e.Counter, &e.Statement, &header, &signature)...); err != nil {
		return err
	}
	if header != "" {
		e.JWS = header + "." + base64.RawURLEncoding.EncodeToString(e.Statement) + "." + base64.RawURLEncoding.EncodeToString(signature)
	}
	return nil
}

// Lookup returns the entry of an action id, or nil.
func (l *Log) Lookup(ctx context.Context, id string) (*Entry, error) {
	var e Entry
	// A connection of its own: the writer's has transactions under way.
	err := e.scan(l.db.QueryRowContext(ctx, "SELECT "+entryColumns+" WHERE l.id = ?", id))
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the record: %w", err)
	}
	return &e, nil
}

// Statements returns the exact bytes of the entries with the numbers from and
// to and those between them, in order.
func (l *Log) Statements(ctx context.Context, from, to uint64) ([][]byte, error) {
	rows, err := l.db.QueryContext(ctx, "SELECT statement FROM leaf WHERE counter BETWEEN ? AND ? ORDER BY counter", int64(from), int64(to))
	if err != nil {
		return nil, fmt.Errorf("reading the record: %w", err)
	}
	defer rows.Close()
	var out [][]byte
	for rows.Next() {
		var b []byte
		if err := rows.Scan(&b); err != nil {
			return nil, fmt.Errorf("reading the record: %w", err)
		}
		out = append(out, b)
	}
	return out, rows.Err()
}

// Snapshot reads a log file as it was at one moment, while a signer may be
// writing it. Close it.
type Snapshot struct {
	Head Head
	db   *sql.DB
	conn *sql.Conn
	tx   *sql.Tx
	size int64 // of the file and its write-ahead log, in bytes
}

// maxRow bounds a row of a record, in bytes: a statement has 64 KiB, a start
// document twice that.
const maxRow = 1 << 20

// Errors of files that are no record.
var (
	errMalformed = errors.New("the file is no record")
	errVersion   = errors.New("the file has another format")
)

// tables are those of a record that a snapshot reads, with their columns.
var tables = map[string][]string{
	"leaf": {"counter", "id", "payload", "statement"}, "header": {"id", "text"}, "signature": {"counter", "header", "signature"}, "hash": {"idx", "hash"},
	"head": {"size", "root", "previous", "time"}, "certificate": {"sha256", "chain"}, "start": {"sha256", "document"}, "checkpoint": {"size", "time", "note"},
}

// OpenSnapshot opens the log file at path for reading.
func OpenSnapshot(ctx context.Context, path string) (_ *Snapshot, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("reading the record %s: %w", path, err)
		}
	}()
	if _, err := os.Stat(path); err != nil {
		return nil, err
	}
	s, err := open(ctx, path, sqlite.OpenReadOnly)
	if !sqlite.NotWritable(err) {
		return s, err
	}
	// SQLite makes a file beside one that was written ahead. Where it may not, and there
	// is nothing but the file, that is all there is to read.
	if fi, again := os.Stat(path + "-wal"); again == nil && fi.Size() > 0 || again != nil && !errors.Is(again, os.ErrNotExist) {
		return nil, err
	}
	return open(ctx, path, sqlite.OpenUnwritten)
}

func open(ctx context.Context, path string, how func(path string) (*sql.DB, error)) (_ *Snapshot, err error) {
	s := &Snapshot{}
	if s.db, err = how(path); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if s.conn, err = s.db.Conn(ctx); err != nil {
		return nil, err
	}
	if err := sqlite.Bound(s.conn, maxRow); err != nil {
		return nil, err
	}
	if s.tx, err = s.conn.BeginTx(ctx, &sql.TxOptions{ReadOnly: true}); err != nil {
		return nil, err
	}
	var version int
	if err := s.tx.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version); err != nil {
		return nil, err
	}
	if version != schemaVersion {
		return nil, fmt.Errorf("%w: %d, this program knows %d", errVersion, version, schemaVersion)
	}
	for _, name := range []string{path, path + "-wal"} {
		if fi, err := os.Stat(name); err == nil {
			s.size += fi.Size()
		} else if name == path || !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	if err := s.plain(ctx); err != nil {
		return nil, err
	}
	s.Head, err = readHead(ctx, s.tx)
	return s, err
}

// plain: what is read stands in tables. Whoever made the file could have views and
// generated columns in their place, which have no end or fill the memory.
func (s *Snapshot) plain(ctx context.Context) error {
	for _, name := range slices.Sorted(maps.Keys(tables)) {
		var text string
		err := s.tx.QueryRowContext(ctx, "SELECT coalesce(sql, '') FROM sqlite_schema WHERE name = ? AND type = 'table'", name).Scan(&text)
		if errors.Is(err, sql.ErrNoRows) || err == nil && !strings.HasPrefix(text, "CREATE TABLE") {
			return fmt.Errorf("%w: it has no table %s", errMalformed, name)
		}
		if err != nil {
			return err
		}
		for _, column := range tables[name] {
			var hidden int
			err := s.tx.QueryRowContext(ctx, "SELECT hidden FROM pragma_table_xinfo(?) WHERE name = ?", name, column).Scan(&hidden)
			if errors.Is(err, sql.ErrNoRows) || err == nil && hidden != 0 {
				return fmt.Errorf("%w: its table %s has no column %s", errMalformed, name, column)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// counted returns a function that is told the bytes of each row that is read. No
// table has more than the file has, unless its pages are used more than once.
func (s *Snapshot) counted() func(bytes int) error {
	left := s.size
	return func(bytes int) error {
		if left -= int64(bytes) + 1; left < 0 {
			return fmt.Errorf("%w: a table has more rows than there is room for", errMalformed)
		}
		return nil
	}
}

// Close ends the reading.
func (s *Snapshot) Close() {
	if s.tx != nil {
		_ = s.tx.Rollback() // it has read only
	}
	if s.conn != nil {
		_ = s.conn.Close()
	}
	_ = s.db.Close()
}

// Entries yields all entries in order, then the first error if there was one.
func (s *Snapshot) Entries(ctx context.Context) iter.Seq2[Entry, error] {
	return s.entries(ctx, 0, math.MaxInt64)
}

// EntriesFrom is Entries from a number on.
func (s *Snapshot) EntriesFrom(ctx context.Context, first uint64) iter.Seq2[Entry, error] {
	return s.entries(ctx, min(first, math.MaxInt64), math.MaxInt64)
}

// entries yields those with numbers of a range.
func (s *Snapshot) entries(ctx context.Context, from, to uint64) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		rows, err := s.tx.QueryContext(ctx, "SELECT "+entryColumns+" WHERE l.counter >= ? AND l.counter <= ? ORDER BY l.counter", int64(from), int64(to))
		if err != nil {
			yield(Entry{}, err)
			return
		}
		defer rows.Close()
		count := s.counted()
		for rows.Next() {
			var e Entry
			err := e.scan(rows)
			if err == nil {
				err = count(len(e.Statement))
			}
			if err != nil {
				yield(Entry{}, err)
				return
			}
			if !yield(e, nil) {
				return
			}
		}
		if err := rows.Err(); err != nil {
			yield(Entry{}, err)
		}
	}
}

// chains returns the stored certificate chains, DER, by the SHA-256 of the leaf.
func (s *Snapshot) chains(ctx context.Context) (map[[32]byte][]byte, error) {
	return s.blobs(ctx, "SELECT sha256, chain FROM certificate")
}

// starts returns the stored start documents by their SHA-256.
func (s *Snapshot) starts(ctx context.Context) (map[[32]byte][]byte, error) {
	return s.blobs(ctx, "SELECT sha256, document FROM start")
}

func (s *Snapshot) blobs(ctx context.Context, query string) (map[[32]byte][]byte, error) {
	rows, err := s.tx.QueryContext(ctx, query)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	out, count := make(map[[32]byte][]byte), s.counted()
	for rows.Next() {
		var sum, content []byte
		if err := rows.Scan(&sum, &content); err != nil {
			return nil, err
		}
		if err := count(len(sum) + len(content)); err != nil {
			return nil, err
		}
		if len(sum) == 32 {
			out[[32]byte(sum)] = content
		}
	}
	return out, rows.Err()
}

type queryer interface {
	QueryRowContext(context.Context, string, ...any) *sql.Row
}

func latestCheckpoint(ctx context.Context, q queryer) (note string, err error) {
	err = q.QueryRowContext(ctx, "SELECT note FROM checkpoint ORDER BY size DESC LIMIT 1").Scan(&note)
	if errors.Is(err, sql.ErrNoRows) {
		return "", nil
	}
	return note, err
}

// checkpoints returns the kept signed checkpoints by size.
func (s *Snapshot) checkpoints(ctx context.Context) (map[uint64]string, error) {
	rows, err := s.tx.QueryContext(ctx, "SELECT size, note FROM checkpoint")
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	out, count := make(map[uint64]string), s.counted()
	for rows.Next() {
		var size uint64
		var note string
		if err := rows.Scan(&size, &note); err != nil {
			return nil, err
		}
		if err := count(len(note)); err != nil {
			return nil, err
		}
		out[size] = note
	}
	return out, rows.Err()
}
