package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"inkan/audit"
	"inkan/scope"
)

func exportCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:  "export",
		Usage: "write entries with their proofs, as JSON lines that can be verified alone or as CSV",
		Flags: []cli.Flag{
			jsonFlag(),
			&cli.StringSliceFlag{Name: "log", Usage: "an agent's record: `FILE` log.db in its state; several are joined"},
			&cli.StringFlag{Name: "agent", Usage: "only the record of this agent: its `NAME` or SPIFFE ID"},
			&cli.StringFlag{Name: "out", Value: "-", Usage: "`FILE` to write; - is standard output"},
			&cli.StringFlag{Name: "format", Value: "jsonl", Usage: "jsonl, or csv for spreadsheets: `FORMAT`"},
			&cli.StringFlag{Name: "from", Usage: "only entries from this `TIME` on (RFC 3339), inclusive"},
			&cli.StringFlag{Name: "to", Usage: "only entries before this `TIME` (RFC 3339), exclusive"},
			&cli.StringFlag{Name: "instrument", Usage: "only entries in this `INSTRUMENT`, such as isin:FR0000120271"},
		},
		Action: func(c *cli.Context) error { return auditExport(e, c) },
	}
}

func auditExport(e *env, c *cli.Context) error {
	logs := c.StringSlice("log")
	if len(logs) == 0 {
		return usage("--log is missing")
	}
	o := audit.ExportOptions{Filter: audit.Filter{Instrument: c.String("instrument")}}
	if i := o.Filter.Instrument; i != "" && !scope.ValidInstrument(i) {
		return usage("--instrument %.80q: isin:, dti: or symbol: and the identifier are expected, such as isin:FR0000120271", i)
	}
	switch c.String("format") {
	case "jsonl":
	case "csv":
		o.CSV = true
		if len(logs) > 1 {
			return usage("a CSV file is of one record: give one --log")
		}
	default:
		return usage("--format %.16q: jsonl or csv is expected", c.String("format"))
	}
	for name, to := range map[string]**scope.Timestamp{"from": &o.Filter.From, "to": &o.Filter.To} {
		v := c.String(name)
		if v == "" {
			continue
		}
		t, err := time.Parse(time.RFC3339Nano, v)
		if err != nil {
			return usage("--%s %.40q: a time such as 2026-07-27T09:30:00Z is expected", name, v)
		}
		*to = &scope.Timestamp{Time: t.UTC().Truncate(time.Microsecond)}
	}
	if f := o.Filter; f.From != nil && f.To != nil && !f.From.Time.Before(f.To.Time) {
		return usage("--from is not before --to")
	}
	if c.Bool("json") && c.String("out") == "-" {
		return usage("--json says on standard output what was exported: give --out a file")
	}
	o.Progress = e.progress("exported")
	var done []*audit.Exported
	write := func(w io.Writer) error {
		for _, path := range logs {
			x, err := exportOne(c, w, path, o)
			if err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			if x != nil {
				done = append(done, x)
			}
		}
		if len(done) == 0 {
			return fmt.Errorf("no record is of the agent %q", c.String("agent"))
		}
		return nil
	}
	if err := e.output(c.String("out"), write); err != nil {
		return err
	}
	for _, x := range done {
		if x.After > 0 {
			fmt.Fprintf(e.stderr, "inkan: %d entries of %s follow the latest signed head and are not in the export: inkan audit checkpoint asks for a head\n", x.After, x.Agent)
		}
	}
	if c.Bool("json") {
		return e.printJSON(done)
	}
	for _, x := range done {
		fmt.Fprintf(e.stderr, "exported %d entries of %s under the head of %s over %d\n", x.Entries, x.Agent, x.Head.Time.Format(scope.TimeFormat), x.Head.Size)
	}
	return nil
}

func exportOne(c *cli.Context, w io.Writer, path string, o audit.ExportOptions) (*audit.Exported, error) {
	s, err := audit.OpenSnapshot(c.Context, path)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	if want := c.String("agent"); want != "" {
		head, err := s.Checkpoint(c.Context)
		if err != nil {
			return nil, err
		}
		if head.Agent != want && !strings.HasSuffix(head.Agent, "/agent/"+want) {
			return nil, nil
		}
	}
	return s.Export(c.Context, w, o)
}

// output writes a file as a whole or not at all, or to standard output.
func (e *env) output(path string, write func(io.Writer) error) (err error) {
	if path == "-" {
		return write(e.stdout)
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	if err := write(f); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
