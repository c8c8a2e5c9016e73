package approver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"inkan/internal/postgres"
	"inkan/internal/sqlite"
)

// schemaVersion is of the tables below. A record of version 1 is brought to it,
// and keeps its entries; one of another version is refused.
const schemaVersion = 2

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
	verdict    TEXT NOT NULL,           -- of the limits over time: permit, deny, event, unchecked, or a rule and a message
	authorized BIGINT NOT NULL,         -- how often
	PRIMARY KEY(agent, counter)
);
CREATE TABLE IF NOT EXISTS book(        -- since version 2: what is kept for the next start
	agent TEXT NOT NULL,
	size  BIGINT NOT NULL,              -- entries that it counts
	part  BIGINT NOT NULL,              -- from 0
	bytes BYTEA NOT NULL,
	PRIMARY KEY(agent, size, part)
);
CREATE TABLE IF NOT EXISTS consent(     -- since version 2: to an agent's reserve
	agent       TEXT NOT NULL,
	certificate BYTEA NOT NULL,         -- SHA-256 of the reserve's
	time        BIGINT NOT NULL,        -- when, in microseconds since 1970
	until       BIGINT NOT NULL         -- and until when it serves
);
`

const schemaRecord = `
CREATE TABLE IF NOT EXISTS record(
	one     BIGINT PRIMARY KEY CHECK(one = 1),
	version BIGINT NOT NULL
)`

// schemaLock is held while the tables are made, so that approvers that start
// together do not both make them.
const schemaLock = 0x696e6b616e

// OpenRecord opens or makes the record of one approver in a file.
func OpenRecord(ctx context.Context, path string) (*Record, error) {
	db, err := sqlite.Open(path)
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1)
	reads, err := sqlite.OpenReadOnly(path)
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	r := newRecord(db, reads)
	if err = r.prepare(ctx); err == nil {
		err = r.statements(ctx)
	}
	if err == nil {
		err = os.Chmod(path, 0o600)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening the record %s: %w", path, err), r.Close())
	}
	return r, nil
}

// OpenSharedRecord opens or makes the record that several approvers share, in
// the PostgreSQL database that a URL names:
//
//	postgres://user@host:port/database?sslrootcert=/path/ca.pem
//	postgres://user@/database?host=/run/postgresql
//
// sslcert and sslkey name a client's certificate and its key. Over TCP the
// server's certificate is verified, for the name in the URL; sslmode=disable is for this machine alone.
// passwordFile is read at each connection; empty: there is no password.
func OpenSharedRecord(ctx context.Context, url, passwordFile string) (*Record, error) {
	at, err := postgres.Parse("record", url)
	if err != nil {
		return nil, err
	}
	db, err := at.Open("inkan approver", passwordFile)
	if err != nil {
		return nil, err
	}
	r := newRecord(db, db)
	r.postgres = true
	ctx, cancel := context.WithTimeout(ctx, postgres.Patience)
	defer cancel()
	if err = r.prepare(ctx); err == nil {
		err = r.statements(ctx)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening the record in %s: %w", at, err), r.Close())
	}
	return r, nil
}

// prepare makes the tables where they are missing and refuses those of another version.
func (r *Record) prepare(ctx context.Context) error {
	tx, err := r.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() // after Commit it does nothing
	if r.postgres {
		if _, err := tx.ExecContext(ctx, "SELECT pg_advisory_xact_lock($1)", int64(schemaLock)); err != nil {
			return err
		}
		if err := postgres.Durable(ctx, tx); err != nil {
			return err
		}
	}
	if _, err := tx.ExecContext(ctx, schemaRecord); err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, "INSERT INTO record(one, version) VALUES(1, $1) ON CONFLICT(one) DO NOTHING", schemaVersion); err != nil {
		return err
	}
	var version int64
	if err := tx.QueryRowContext(ctx, "SELECT version FROM record").Scan(&version); err != nil {
		return err
	}
	switch version {
	case schemaVersion:
	case 1: // it had no kept books; approvers that know version 1 and are running do not look at them
		if _, err := tx.ExecContext(ctx, "UPDATE record SET version = $1", schemaVersion); err != nil {
			return err
		}
	default:
		return fmt.Errorf("its tables are of version %d, this program knows version %d", version, schemaVersion)
	}
	for statement := range strings.SplitSeq(schema, ";\n") {
		if _, err := tx.ExecContext(ctx, statement); err != nil {
			return err
		}
	}
	return tx.Commit()
}
