package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/urfave/cli/v2"
)

// required returns the value of a flag that must be given.
func required(c *cli.Context, name string) (string, error) {
	if v := c.String(name); v != "" {
		return v, nil
	}
	return "", usage("--%s is missing", name)
}

// readInput reads a file, or standard input for "-", of at most max bytes.
func (e *env) readInput(path string, max int) ([]byte, error) {
	var r io.Reader = e.stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		r = f
	}
	b, err := io.ReadAll(io.LimitReader(r, int64(max)+1))
	if err != nil {
		return nil, err
	}
	if len(b) > max {
		return nil, fmt.Errorf("%s has more than %d bytes", path, max)
	}
	return b, nil
}

// show prints v as JSON with --json, else calls human.
func (e *env) show(c *cli.Context, v any, human func()) error {
	if c.Bool("json") {
		return e.printJSON(v)
	}
	human()
	return nil
}

// valid is the result of checking a configuration file.
func (e *env) valid(c *cli.Context) error {
	return e.show(c, map[string]bool{"valid": true}, func() { e.printf("the configuration is valid\n") })
}

func (e *env) printf(format string, a ...any) { fmt.Fprintf(e.stdout, format, a...) }

// interrupted ends a daemon's context; the signal handling is main's.
func interrupted(c *cli.Context) context.Context { return c.Context }
