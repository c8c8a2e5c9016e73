// Package sqlite opens SQLite databases whose commits are on disk when they
// return: see [Open].
package sqlite

import (
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"sync"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// setUp has every commit of this process sync its data with fdatasync, as
// SQLite does in the builds of distributions. fsync adds the file's times, which
// nothing here depends on, and is what a commit waits for on a journaling file system.
var setUp = sync.OnceValue(func() error {
	if _, err := sqlite.Fdatasync(true); err != nil && !errors.Is(err, sqlite.ErrFdatasyncUnavailable) {
		return err
	}
	return nil
})

// Open opens or makes the database at path, in write-ahead mode. A transaction
// begins by taking the right to write, for which it waits up to five seconds, and is
// on disk when it was committed. pragmas are such as "foreign_keys(1)".
func Open(path string, pragmas ...string) (*sql.DB, error) {
	if err := setUp(); err != nil {
		return nil, err
	}
	var b strings.Builder
	fmt.Fprintf(&b, "file:%s?_txlock=immediate", escaper.Replace(path))
	// The log goes into the file after each 4000 pages: with fewer, more commits are slow for it.
	for _, p := range append([]string{"journal_mode(WAL)", "synchronous(FULL)", "wal_autocheckpoint(4000)", "busy_timeout(5000)"}, pragmas...) {
		b.WriteString("&_pragma=" + p)
	}
	return sql.Open("sqlite", b.String())
}

// OpenReadOnly opens the database at path, which another process may be writing,
// and anybody may have written.
func OpenReadOnly(path string) (*sql.DB, error) {
	return sql.Open("sqlite", "file:"+escaper.Replace(path)+"?mode=ro&_pragma=busy_timeout(5000)&_pragma=query_only(1)&_pragma=trusted_schema(0)&_pragma=cell_size_check(1)")
}

// OpenUnwritten is OpenReadOnly where nothing can be written beside the file, such
// as on a medium that is read-only. It reads the file alone, without a write-ahead
// log, so nobody may be writing it.
func OpenUnwritten(path string) (*sql.DB, error) {
	return sql.Open("sqlite", "file:"+escaper.Replace(path)+"?mode=ro&immutable=1&_pragma=query_only(1)&_pragma=trusted_schema(0)&_pragma=cell_size_check(1)")
}

// escaper keeps what has a meaning in the URI of a file from having one in a path.
var escaper = strings.NewReplacer("%", "%25", "?", "%3f", "#", "%23")

// NotWritable says whether an error is that something must be written to read.
func NotWritable(err error) bool {
	e, ok := errors.AsType[*sqlite.Error](err)
	return ok && (e.Code()&0xff == sqlite3.SQLITE_READONLY || e.Code()&0xff == sqlite3.SQLITE_CANTOPEN)
}

// Bound has the connection refuse values and rows of more bytes.
func Bound(c *sql.Conn, bytes int) error {
	_, err := sqlite.Limit(c, sqlite3.SQLITE_LIMIT_LENGTH, bytes)
	return err
}

// Failed says whether an error is one of the database, and damaged whether it is
// for what is in the file, not for what is around it.
func Failed(err error) (failed, damaged bool) {
	e, ok := errors.AsType[*sqlite.Error](err)
	if !ok {
		return false, false
	}
	switch e.Code() & 0xff {
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_ERROR:
		return true, true
	}
	return true, false
}

// NotUnique says whether an error is that a row like it is there already.
func NotUnique(err error) bool {
	e, ok := errors.AsType[*sqlite.Error](err)
	return ok && e.Code() == sqlite3.SQLITE_CONSTRAINT_UNIQUE
}
