package main

import (
	"context"
	"errors"
	"fmt"
	"os"
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
		return nil, passwordOfFile(setting)
	}
	return verify.OpenSQLiteStore(ctx, below(place))
}

func passwordOfFile(setting string) error {
	return errors.New("a password file is for a store in PostgreSQL, and " + setting + " is a file")
}

// checkReplay says whether a store could be opened, and makes no file: it would
// belong to whoever checks.
func checkReplay(ctx context.Context, setting, place, passwordFile, dir string) error {
	if postgres.IsURL(place) {
		s, err := openReplay(ctx, setting, place, passwordFile, dir)
		if err != nil {
			return err
		}
		return s.Close()
	}
	if passwordFile != "" {
		return passwordOfFile(setting)
	}
	if !filepath.IsAbs(place) {
		place = filepath.Join(dir, place)
	}
	if fi, err := os.Stat(filepath.Dir(place)); err != nil {
		return fmt.Errorf("%s: its directory: %w", setting, err)
	} else if !fi.IsDir() {
		return fmt.Errorf("%s: %s is not a directory", setting, filepath.Dir(place))
	}
	return nil
}
