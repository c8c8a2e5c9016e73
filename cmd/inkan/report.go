package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/urfave/cli/v2"

	"inkan/audit"
	"inkan/audit/report"
)

func reportCommand(e *env, flags ...cli.Flag) *cli.Command {
	return &cli.Command{
		Name:  "report",
		Usage: "verify a record, or an export of one, and write a page about it for a person; exit code 4 when it does not verify",
		Flags: append(flags, &cli.StringFlag{Name: "out", Value: "-", Usage: "HTML `FILE` to write; - is standard output"}),
		Action: func(c *cli.Context) error {
			return auditReport(e, c)
		},
	}
}

// auditReport writes the page whether or not the record verifies: then it says so.
func auditReport(e *env, c *cli.Context) error {
	out := c.String("out")
	if c.Bool("json") && out == "-" {
		return usage("--json says on standard output what was verified: give --out a file")
	}
	about := report.About{At: time.Now(), Source: filepath.Base(c.String("log"))}
	read := sha256.New()
	var watch report.Collector
	reports, unverified := e.check(c, watch.Options(audit.VerifyOptions{}), read)
	if _, ok := errors.AsType[*audit.Unproven](unverified); unverified != nil && !ok {
		return unverified
	}
	if export := c.String("export"); export != "" {
		if about.Source = filepath.Base(export); export == "-" {
			about.Source = "standard input"
		}
		if unverified == nil { // it was read to its end
			about.SHA256 = read.Sum(nil)
		}
	}
	var err error
	if about.CA, err = readCertificates(c.String("ca")); err != nil {
		return err
	}
	page, err := watch.Page(about, reports, unverified)
	if err != nil {
		return err
	}
	if err := e.output(out, func(w io.Writer) error { return page.Write(w) }); err != nil {
		return fmt.Errorf("writing the page: %w", err)
	}
	if out == "-" {
		return unprovenExit(unverified)
	}
	return e.tellVerified(c, reports, unverified)
}
