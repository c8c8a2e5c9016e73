package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"inkan/audit"
	"inkan/internal/strictjson"
	"inkan/journal"
	"inkan/scope"
	"inkan/signer"
)

func auditCommand(e *env) *cli.Command {
	log := &cli.StringFlag{Name: "log", Usage: "an agent's record: `FILE` log.db in its state"}
	ca := &cli.StringFlag{Name: "ca", Usage: "PEM `FILE` with the CA certificate"}
	export := &cli.StringFlag{Name: "export", Usage: "an export in JSON lines instead of the record: `FILE`; - is standard input"}
	return &cli.Command{
		Name:  "audit",
		Usage: "show, verify and export an agent's record, offline",
		Subcommands: []*cli.Command{
			{Name: "verify", Usage: "verify a record, or an export of one alone; exit code 4 when it does not verify", Flags: []cli.Flag{log, export, ca, jsonFlag(),
				&cli.StringFlag{Name: "journal", Usage: "with --log: the signer's `FILE` signatures.journal; then the TPM's testimony about its signatures is held against the record"}},
				Action: func(c *cli.Context) error { return auditVerify(e, c) }},
			{Name: "show", Usage: "show entries", Flags: []cli.Flag{log, jsonFlag(), &cli.StringFlag{Name: "id", Usage: "of the action with this `ID`"},
				&cli.Uint64Flag{Name: "from", Value: 1, Usage: "first `NUMBER`"}, &cli.Uint64Flag{Name: "limit", Value: 100, Usage: "at most this `COUNT`"}},
				Action: func(c *cli.Context) error { return auditShow(e, c) }},
			{Name: "checkpoint", Usage: "have the signer sign the head of the calling agent's record", Flags: signerFlags(jsonFlag()), Action: func(c *cli.Context) error { return auditCheckpoint(e, c) }},
			exportCommand(e),
			reportCommand(e, log, export, ca, jsonFlag()),
			{Name: "schema", Usage: "print the JSON Schema of a line of an export", Action: func(*cli.Context) error { e.printf("%s", audit.ExportSchema); return nil }},
		},
	}
}

// progress says on standard error how far something is, once a second.
func (e *env) progress(what string) func(done, total uint64) {
	last := time.Now()
	return func(done, total uint64) {
		if time.Since(last) > time.Second {
			last = time.Now()
			fmt.Fprintf(e.stderr, "%s %d of %d entries\n", what, done, total)
		}
	}
}

// verified is what audit verify prints in JSON.
type verified struct {
	Verified bool `json:"verified"`
	*audit.Report
}

// unverified is what it prints when something does not verify.
type unverified struct {
	Verified bool       `json:"verified"`
	Rule     audit.Rule `json:"rule"`
	Entry    uint64     `json:"entry,omitzero"`
	Reason   string     `json:"reason"`
}

// check verifies the record or the export that the flags name. What is read of an
// export goes to copied as well.
func (e *env) check(c *cli.Context, o audit.VerifyOptions, copied io.Writer) ([]*audit.Report, error) {
	log, export := c.String("log"), c.String("export")
	if (log == "") == (export == "") {
		return nil, usage("give --log, or --export")
	}
	ca, err := required(c, "ca")
	if err != nil {
		return nil, err
	}
	if o.Roots, err = readPool(ca); err != nil {
		return nil, err
	}
	o.Progress = e.progress("verified")
	if log != "" {
		r, err := audit.VerifyFile(c.Context, log, o)
		return []*audit.Report{r}, err
	}
	in := e.stdin
	if export != "-" {
		f, err := os.Open(export)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	return audit.VerifyExport(c.Context, io.TeeReader(in, copied), o)
}

func auditVerify(e *env, c *cli.Context) error {
	var options audit.VerifyOptions
	var books *books
	if path := c.String("journal"); path != "" {
		if c.String("log") == "" {
			return usage("--journal needs --log: a part of a record does not show all that was signed")
		}
		var err error
		if books, err = openBooks(path, &options); err != nil {
			return err
		}
	}
	reports, err := e.check(c, options, io.Discard)
	if err == nil && books != nil {
		err = books.close(reports[0])
	}
	return e.tellVerified(c, reports, err)
}

// unprovenExit gives what does not verify its exit code.
func unprovenExit(err error) error {
	if _, ok := errors.AsType[*audit.Unproven](err); ok {
		return withCode(exitUnproven, err)
	}
	return err
}

// tellVerified prints how a verification ended.
func (e *env) tellVerified(c *cli.Context, reports []*audit.Report, err error) error {
	if x, ok := errors.AsType[*journal.Contradiction](err); ok {
		if c.Bool("json") {
			if err := e.printJSON(unverified{Rule: audit.Rule(x.Rule), Reason: x.Error()}); err != nil {
				return err
			}
		}
		return withCode(exitUnproven, err)
	}
	if u, ok := errors.AsType[*audit.Unproven](err); ok {
		if c.Bool("json") {
			if err := e.printJSON(unverified{Rule: u.Rule, Entry: u.Counter, Reason: u.Reason}); err != nil {
				return err
			}
		}
	}
	if err != nil {
		return unprovenExit(err)
	}
	for _, r := range reports { // one, or as many as were joined in an export
		if err := e.show(c, verified{true, r}, func() { e.tell(r) }); err != nil {
			return err
		}
	}
	return nil
}

func (e *env) tell(r *audit.Report) {
	what := "record"
	if r.Filter != nil {
		what = "export (" + r.Filter.String() + ")"
	}
	e.printf("The %s of %s verifies: %d entries, %d permits (%d signed), %d denials, %d events", what, r.Agent, r.Entries, r.Permits, r.Signed, r.Denials, r.Events)
	if r.Entries > 0 {
		e.printf(", from %s to %s", r.First.Format(scope.TimeFormat), r.Last.Format(scope.TimeFormat))
	}
	e.printf(".\nroot %s\n", r.Root)
	for _, proven := range []bool{true, false} {
		e.printf("%s:\n", map[bool]string{true: "It proves", false: "It does not prove"}[proven])
		for _, s := range r.Claims {
			if s.Proven == proven {
				e.printf("  - %s\n", s.Text)
			}
		}
	}
}

func auditCheckpoint(e *env, c *cli.Context) error {
	to, err := theSigner(c)
	if err != nil {
		return err
	}
	var sealed signer.Checkpoint
	if err := to.Checkpoint(c.Context, &sealed); err != nil {
		return refusedOr(err)
	}
	return e.show(c, sealed, func() { e.printf("%s", sealed.Note) })
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
	for x, err := range s.EntriesFrom(c.Context, c.Uint64("from")) {
		if err != nil {
			return err
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
				// Nothing of it is verified, so its texts may be anybody's.
				fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", x.Counter, st.Time.Time.Format(scope.TimeFormat), oneLine(st.Decision.Decision), oneLine(string(st.Kind)), oneLine(st.Audience),
					oneLine(o.SecurityID), oneLine(o.Side), text(o.OrderQty), text(o.Price), oneLine(why(st)))
			}
		})
	})
}

// why is the reason of a refusal with its rule, or what an event says.
func why(st *scope.Statement) string {
	switch {
	case st.Decision.Rule != "":
		return string(st.Decision.Rule) + ": " + st.Decision.Message
	case st.Kind == scope.EventPolicy || st.Kind == scope.EventRearm:
		return "a document that a controller signed: --json shows it"
	}
	return st.Decision.Message + st.Event
}

func text(d *scope.Decimal) string {
	if d == nil {
		return ""
	}
	return d.String()
}
