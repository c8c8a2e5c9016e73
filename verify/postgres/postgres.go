// Package postgres opens a receiver's store in PostgreSQL: [Open]. Several
// receivers share one; together they accept each action once, and hold limits over
// time as one receiver does.
package postgres

import (
	"context"
	"errors"
	"fmt"

	"inkan/internal/postgres"
	"inkan/verify"
)

// schemaLock is held while the tables are made, so that receivers that start
// together do not both make them.
const schemaLock = 0x696e6b61_7265

// Open opens or makes the store in the database that a URL names; its user owns
// the tables. setting is the name of the setting that the URL stands in, for error messages.
//
//	postgres://user@host:port/database?sslrootcert=/path/ca.pem
//	postgres://user@/database?host=/run/postgresql
//
// Over TCP the server's certificate is verified, for the name in the URL. passwordFile is
// read at each connection; empty: there is no password. A server that acknowledges
// what is not on disk is refused. Close the store.
func Open(ctx context.Context, setting, url, passwordFile string) (*verify.SQLStore, error) {
	at, err := postgres.Parse(setting, url)
	if err != nil {
		return nil, err
	}
	db, err := at.Open("inkan receiver", passwordFile)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, postgres.Patience)
	defer cancel()
	s, err := func() (*verify.SQLStore, error) {
		tx, err := db.BeginTx(ctx, nil)
		if err != nil {
			return nil, err
		}
		defer func() { _ = tx.Rollback() }() // it only holds the lock
		if err := postgres.Durable(ctx, tx); err != nil {
			return nil, err
		}
		if _, err := tx.ExecContext(ctx, "SELECT pg_advisory_xact_lock($1)", int64(schemaLock)); err != nil {
			return nil, err
		}
		return verify.NewSQLStore(ctx, db)
	}()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening the receiver's store in %s: %w", at, err), db.Close())
	}
	return s, nil
}
