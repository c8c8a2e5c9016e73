package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/urfave/cli/v2"

	"inkan/audit"
	"inkan/internal/strictjson"
	"inkan/scope"
	"inkan/signer/client"
)

func scopeCommand(e *env) *cli.Command {
	flags := func(more ...cli.Flag) []cli.Flag {
		return append([]cli.Flag{&cli.StringFlag{Name: "scope", Usage: "YAML or JSON `FILE`; - is standard input"}, jsonFlag()}, more...)
	}
	action := append([]cli.Flag{
		&cli.StringFlag{Name: "action", Usage: "JSON `FILE` with an action"},
		&cli.StringFlag{Name: "reference", Usage: "JSON `FILE` with a reference price"},
		&cli.TimestampFlag{Name: "at", Layout: time.RFC3339Nano, Usage: "`TIME` of the action, now by default"},
		&cli.StringFlag{Name: "history", Usage: "JSON `FILE` with what was done before, for limits over time: docs/scope.md"},
		&cli.StringFlag{Name: "log", Usage: "`FILE` with an agent's record, for limits over time; it is not verified"},
	}, sourceFlags()...)
	return &cli.Command{
		Name:  "scope",
		Usage: "write, read and try out scopes",
		Subcommands: []*cli.Command{
			{Name: "check", Usage: "check a scope, or an action against it; exit code 3 when it is refused", Flags: flags(action...), Action: func(c *cli.Context) error { return scopeCheck(e, c) }},
			{Name: "explain", Usage: "say in words what a scope allows, or every rule that refuses an action, and by how much", Flags: flags(action...), Action: func(c *cli.Context) error { return scopeExplain(e, c) }},
			{Name: "canonical", Usage: "print a scope's one spelling", Flags: flags(), Action: func(c *cli.Context) error {
				s, err := e.readScope(c)
				if err != nil {
					return err
				}
				e.printf("%s\n", s.Canonical())
				return nil
			}},
			{Name: "contains", Usage: "check that one scope allows nothing that another does not; exit code 3 when it does", Flags: flags(&cli.StringFlag{Name: "inner", Usage: "`FILE` with the narrower scope"}),
				Action: func(c *cli.Context) error { return scopeContains(e, c) }},
			{Name: "key", Usage: "print a controller's public key as scopes state it", Flags: []cli.Flag{jsonFlag(), &cli.StringFlag{Name: "key", Usage: "`URI` of the key: file:, tpm: or pkcs11:"}},
				Action: func(c *cli.Context) error { return scopeKey(e, c) }},
			{Name: "schema", Usage: "print the JSON Schema of a document", Flags: []cli.Flag{&cli.StringFlag{Name: "of", Value: "scope", Usage: "scope, action or statement"}}, Action: func(c *cli.Context) error {
				b, err := scope.Schema(c.String("of"))
				if err != nil {
					return withCode(exitUsage, err)
				}
				e.printf("%s", b)
				return nil
			}},
		},
	}
}

// withNewID replaces an action's id, before anything is said of the rest.
func withNewID(b []byte) ([]byte, error) {
	var a map[string]any
	if err := strictjson.Unmarshal(b, scope.MaxAction, &a); err != nil {
		return nil, fmt.Errorf("action: %w", err)
	}
	a["id"] = client.NewID()
	return strictjson.Marshal(a)
}

// readAction reads --action and what it is checked in.
func (e *env) readAction(c *cli.Context) (*scope.Action, scope.Env, error) {
	env := scope.Env{Now: time.Now()}
	if at := c.Timestamp("at"); at != nil {
		env.Now = *at
	}
	env.AttestedAt = env.Now
	b, err := e.readInput(c.String("action"), scope.MaxAction)
	if err != nil {
		return nil, env, err
	}
	a, err := scope.ParseAction(b)
	if err != nil {
		return nil, env, withCode(exitRefused, err)
	}
	if path := c.String("reference"); path != "" {
		b, err := e.readInput(path, scope.MaxAction)
		if err != nil {
			return nil, env, err
		}
		env.Reference = new(scope.ReferencePrice)
		if err := strictjson.Unmarshal(b, scope.MaxAction, env.Reference); err != nil {
			return nil, env, fmt.Errorf("%s: %w", path, err)
		}
	}
	return a, env, nil
}

// readBook sums up --history or --log; without them nothing was done before.
func (e *env) readBook(c *cli.Context, s *scope.Scope) (*scope.Book, error) {
	history, log := c.String("history"), c.String("log")
	switch {
	case history != "" && log != "":
		return nil, usage("--history and --log: one of them says what was done before")
	case history != "":
		b, err := e.readInput(history, scope.MaxHistory)
		if err != nil {
			return nil, err
		}
		h, err := scope.ParseHistory(b)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", history, err)
		}
		book, _, err := h.Play(s)
		return book, err
	}
	book := scope.NewBook()
	if log == "" {
		return book, nil
	}
	snapshot, err := audit.OpenSnapshot(c.Context, log)
	if err != nil {
		return nil, err
	}
	defer snapshot.Close()
	for entry, err := range snapshot.Entries(c.Context) {
		if err != nil {
			return nil, err
		}
		st, err := scope.ParseStatement(entry.Statement)
		if err != nil {
			return nil, fmt.Errorf("entry %d: %w", entry.Counter, err)
		}
		book.Replay(st)
	}
	return book, nil
}

// explainLimits lists the limits over time that refuse what the scope alone permits.
func (e *env) explainLimits(c *cli.Context, s *scope.Scope, p *scope.Permit) ([]*scope.Refusal, error) {
	book, err := e.readBook(c, s)
	if err != nil {
		return nil, err
	}
	return book.Explain(s, scope.UseOf(p, p.Env().Now)), nil
}

func scopeCheck(e *env, c *cli.Context) error {
	s, err := e.readScope(c)
	if err != nil {
		return err
	}
	if c.String("action") == "" {
		return e.show(c, map[string]any{"valid": true, "sha256": fmt.Sprintf("%x", s.Hash())}, func() { e.printf("the scope is valid; its SHA-256 is %x\n", s.Hash()) })
	}
	a, env, err := e.readAction(c)
	if err != nil {
		return err
	}
	p, err := scope.Check(s, a, env)
	if err == nil {
		err = checkSource(c, s)
	}
	if err == nil {
		var limits []*scope.Refusal
		if limits, err = e.explainLimits(c, s, p); len(limits) > 0 {
			err = limits[0]
		}
	}
	if refusal, ok := errors.AsType[*scope.Refusal](err); err != nil && !ok {
		return err
	} else if ok {
		if c.Bool("json") {
			if err := e.printJSON(map[string]any{"decision": "deny", "refusal": refusal}); err != nil {
				return err
			}
		}
		return withCode(exitRefused, err)
	}
	amount, currency, _ := p.Notional()
	return e.show(c, map[string]any{"decision": "permit", "notional": amount, "currency": currency}, func() {
		e.printf("allowed")
		if currency != "" {
			e.printf(": it is worth %s %s", amount, currency)
		}
		e.printf("\n")
	})
}

func scopeExplain(e *env, c *cli.Context) error {
	s, err := e.readScope(c)
	if err != nil {
		return err
	}
	if c.String("action") == "" {
		return e.show(c, map[string]any{"description": s.Describe()}, func() {
			for _, line := range s.Describe() {
				e.printf("%s\n", line)
			}
		})
	}
	a, env, err := e.readAction(c)
	if err != nil {
		return err
	}
	all := scope.Explain(s, a, env)
	if err := checkSource(c, s); err != nil {
		refusal, ok := errors.AsType[*scope.Refusal](err)
		if !ok {
			return err
		}
		all = append(all, refusal)
	}
	if p, err := scope.Check(s, a, env); err == nil {
		limits, err := e.explainLimits(c, s, p)
		if err != nil {
			return err
		}
		all = append(all, limits...)
	}
	if len(all) == 0 {
		return e.show(c, map[string]any{"decision": "permit"}, func() { e.printf("allowed\n") })
	}
	if err := e.show(c, map[string]any{"decision": "deny", "refusals": all}, func() {
		for _, r := range all {
			e.printf("%s\n", r)
		}
	}); err != nil {
		return err
	}
	return withCode(exitRefused, fmt.Errorf("%d rules refuse the action", len(all)))
}

func scopeContains(e *env, c *cli.Context) error {
	outer, err := e.readScope(c)
	if err != nil {
		return err
	}
	path, err := required(c, "inner")
	if err != nil {
		return err
	}
	b, err := e.readInput(path, scope.MaxScope)
	if err != nil {
		return err
	}
	inner, err := scope.ParseYAML(b)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if err := scope.Contains(outer, inner); err != nil {
		return withCode(exitRefused, fmt.Errorf("it is wider: %w", err))
	}
	return e.show(c, map[string]any{"contains": true}, func() { e.printf("it allows nothing more\n") })
}
