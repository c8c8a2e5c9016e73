package main

import (
	"context"
	"errors"
	"path/filepath"

	"inkan/internal/postgres"
	"inkan/verify"
	verifypostgres "inkan/verify/postgres"
)

// openReplay opens a receiver's store: a file, or the PostgreSQL database of a
// URL. setting is its name in error messages; relative files are below dir.
func openReplay(ctx context.Context, setting, place, passwordFile, dir string) (*verify.SQLStore, error) {
	below := func(p string) string {
		if p == "" || filepath.IsAbs(p) {
			return p
		}
		return filepath.Join(dir, p)
	}
	if postgres.IsURL(place) {
		return verifypostgres.Open(ctx, setting, place, below(passwordFile))
	}
	if passwordFile != "" {
		return nil, errors.New("a password file is for a store in PostgreSQL, and " + setting + " is a file")
	}
	return verify.OpenSQLiteStore(ctx, below(place))
}
