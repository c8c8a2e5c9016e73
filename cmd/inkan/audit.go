package main

import (
	"errors"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"inkan/audit"
	"inkan/internal/strictjson"
	"inkan/scope"
)

func auditCommand(e *env) *cli.Command {
	log := &cli.StringFlag{Name: "log", Usage: "an agent's record: `FILE` log.db in its state"}
	return &cli.Command{
		Name:  "audit",
		Usage: "show and verify an agent's record, offline",
		Subcommands: []*cli.Command{
			{Name: "verify", Usage: "verify a whole record; exit code 4 when it does not verify", Flags: []cli.Flag{log, &cli.StringFlag{Name: "ca", Usage: "PEM `FILE` with the CA certificate"}, jsonFlag()},
				Action: func(c *cli.Context) error { return auditVerify(e, c) }},
			{Name: "show", Usage: "show entries", Flags: []cli.Flag{log, jsonFlag(), &cli.StringFlag{Name: "id", Usage: "of the action with this `ID`"},
				&cli.Uint64Flag{Name: "from", Value: 1, Usage: "first `NUMBER`"}, &cli.Uint64Flag{Name: "limit", Value: 100, Usage: "at most this `COUNT`"}},
				Action: func(c *cli.Context) error { return auditShow(e, c) }},
		},
	}
}

func auditVerify(e *env, c *cli.Context) error {
	path, err := required(c, "log")
	if err != nil {
		return err
	}
	ca, err := required(c, "ca")
	if err != nil {
		return err
	}
	roots, err := readPool(ca)
	if err != nil {
		return err
	}
	last := time.Now()
	r, err := audit.VerifyFile(c.Context, path, roots, func(done, total uint64) {
		if time.Since(last) > time.Second {
			last = time.Now()
			fmt.Fprintf(e.stderr, "verified %d of %d entries\n", done, total)
		}
	})
	if u, ok := errors.AsType[*audit.Unproven](err); ok {
		if c.Bool("json") {
			if err := e.printJSON(map[string]any{"verified": false, "entry": u.Counter, "reason": u.Reason}); err != nil {
				return err
			}
		}
		return withCode(exitUnproven, err)
	}
	if err != nil {
		return err
	}
	type verified struct {
		Verified bool `json:"verified"`
		*audit.Report
	}
	return e.show(c, verified{true, r}, func() {
		e.printf("The record of %s verifies: %d entries, %d permits (%d signed), %d denials, from %s to %s.\n", r.Agent, r.Entries, r.Permits, r.Signed, r.Denials,
			r.First.Format(scope.TimeFormat), r.Last.Format(scope.TimeFormat))
		e.printf("root %s\nIt proves:\n", r.Root)
		for _, s := range r.Proves {
			e.printf("  - %s\n", s)
		}
		e.printf("It does not prove:\n")
		for _, s := range r.DoesNotProve {
			e.printf("  - %s\n", s)
		}
	})
}

// shown is an entry as audit show prints it in JSON.
type shown struct {
	Counter   uint64          `json:"counter"`
	Statement scope.Statement `json:"statement"`
	JWS       string          `json:"jws,omitempty"`
}

func auditShow(e *env, c *cli.Context) error {
	path, err := required(c, "log")
	if err != nil {
		return err
	}
	s, err := audit.OpenSnapshot(c.Context, path)
	if err != nil {
		return err
	}
	defer s.Close()
	list := []shown{}
	for x, err := range s.Entries(c.Context) {
		if err != nil {
			return err
		}
		if x.Counter < c.Uint64("from") {
			continue
		}
		if uint64(len(list)) == c.Uint64("limit") {
			break
		}
		var st scope.Statement
		if err := strictjson.Unmarshal(x.Statement, scope.MaxStatement, &st); err != nil {
			return fmt.Errorf("entry %d: %w", x.Counter, err)
		}
		if id := c.String("id"); id != "" && id != st.ID {
			continue
		}
		list = append(list, shown{x.Counter, st, x.JWS})
	}
	return e.show(c, list, func() {
		e.table("NUMBER\tTIME\tDECISION\tACTION\tVENUE\tINSTRUMENT\tSIDE\tQTY\tPRICE\tWHY", func(w *tabwriter.Writer) {
			for _, x := range list {
				st := &x.Statement
				o := st.Order
				if o == nil {
					o = &scope.Order{}
				}
				fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", x.Counter, st.Time.Time.Format(scope.TimeFormat), st.Decision.Decision, st.Kind, st.Audience,
					o.SecurityID, o.Side, text(o.OrderQty), text(o.Price), st.Decision.Message)
			}
		})
	})
}

func text(d *scope.Decimal) string {
	if d == nil {
		return ""
	}
	return d.String()
}
