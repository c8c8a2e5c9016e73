package main

import (
	"crypto"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"inkan/internal/keyuri"
	"inkan/scope"
	"inkan/signer"
)

// Commands of those who control agents: docs/controls.md.

func killCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:  "kill",
		Usage: "stop agents of the signer on this host: until they are re-armed only cancels pass",
		Flags: []cli.Flag{socketFlag(), jsonFlag(),
			&cli.StringFlag{Name: "scope", Value: "agent", Usage: "`WHAT` is stopped: agent, venue or firm"},
			&cli.StringFlag{Name: "agent", Usage: "`NAME` of the agent; all agents where it is not given for a venue"},
			&cli.StringFlag{Name: "venue", Usage: "`MIC` of the venue, or lei: and its LEI"},
			&cli.StringFlag{Name: "reason", Usage: "`WHY`, for the record"}},
		Action: func(c *cli.Context) error {
			reason, err := required(c, "reason")
			if err != nil {
				return err
			}
			to, err := theSigner(c)
			if err != nil {
				return err
			}
			var out []signer.Controlled
			if err := to.Post(c.Context, "/v1/kill", signer.KillRequest{Scope: scope.KillScope(c.String("scope")), Agent: c.String("agent"), Venue: c.String("venue"), Reason: reason}, &out); err != nil {
				return refusedOr(err)
			}
			return e.show(c, out, func() {
				for _, x := range out {
					e.printf("%s is stopped: entry %d of its record\n", x.Agent, x.Event)
				}
			})
		},
	}
}

// documentFlags are those of commands that sign a document.
func documentFlags(life time.Duration, more ...cli.Flag) []cli.Flag {
	return append(append(more,
		&cli.StringFlag{Name: "agent", Usage: "SPIFFE `ID` of the agent"},
		&cli.StringFlag{Name: "key", Usage: "`URI` of the controller's key: file:, tpm: or pkcs11:"},
		&cli.DurationFlag{Name: "valid", Value: life, Usage: "for what `TIME` from now on it is valid"},
		&cli.StringFlag{Name: "out", Usage: "`FILE` for the document; - is standard output", Value: "-"}), jsonFlag())
}

// signedDocument is what commands that sign a document print in JSON.
type signedDocument struct {
	Document string `json:"document"`
}

// document opens the key, has a document signed and writes it.
func (e *env) document(c *cli.Context, sign func(key crypto.Signer, agent string, issued, expires time.Time) (string, error)) error {
	agent, err := required(c, "agent")
	if err != nil {
		return err
	}
	if !strings.HasPrefix(agent, "spiffe://") {
		return usage("--agent %.80q: a SPIFFE ID is expected, such as spiffe://example.org/agent/mm-07: inkan status shows it", agent)
	}
	uri, err := required(c, "key")
	if err != nil {
		return err
	}
	key, closer, err := keyuri.Open(uri)
	if err != nil {
		return err
	}
	now := time.Now().UTC().Truncate(time.Second)
	text, err := sign(key, agent, now, now.Add(c.Duration("valid").Truncate(time.Second)))
	if err = errors.Join(err, closer.Close()); err != nil {
		return err
	}
	if out := c.String("out"); out != "-" {
		if err := os.WriteFile(out, []byte(text+"\n"), 0o644); err != nil {
			return err
		}
		if !c.Bool("json") {
			return nil
		}
	}
	return e.show(c, signedDocument{text}, func() { e.printf("%s\n", text) })
}

// readDocument reads a signed document from a file.
func (e *env) readDocument(path string) (string, error) {
	b, err := e.readInput(path, scope.MaxEvent)
	return strings.TrimSuffix(string(b), "\n"), err
}

// send hands a document to the signer.
func (e *env) send(c *cli.Context, path string) error {
	file, err := required(c, "document")
	if err != nil {
		return err
	}
	text, err := e.readDocument(file)
	if err != nil {
		return err
	}
	to, err := theSigner(c)
	if err != nil {
		return err
	}
	var out signer.Controlled
	if err := to.Post(c.Context, path, signer.DocumentRequest{Document: text}, &out); err != nil {
		return refusedOr(err)
	}
	return e.show(c, out, func() { e.printf("%s: entry %d of its record\n", out.Agent, out.Event) })
}

func documentFlag() cli.Flag {
	return &cli.StringFlag{Name: "document", Usage: "`FILE` with the signed document; - is standard input"}
}

func rearmCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:  "rearm",
		Usage: "end a kill, or what a throttle disabled, with the signature of a controller",
		Subcommands: []*cli.Command{
			{Name: "sign", Usage: "sign with a controller's key that an agent goes on", Flags: documentFlags(time.Hour,
				&cli.Uint64Flag{Name: "entry", Usage: "`NUMBER` of the kill in the agent's record: inkan status shows it"},
				&cli.StringFlag{Name: "reason", Usage: "`WHY`, for the record"}),
				Action: func(c *cli.Context) error {
					reason, err := required(c, "reason")
					if err != nil {
						return err
					}
					return e.document(c, func(key crypto.Signer, agent string, issued, expires time.Time) (string, error) {
						return scope.SignRearm(key, agent, scope.Counter(c.Uint64("entry")), reason, issued, expires)
					})
				}},
			{Name: "send", Usage: "hand the document to the signer on this host; exit code 3 when it is refused", Flags: []cli.Flag{socketFlag(), documentFlag(), jsonFlag()},
				Action: func(c *cli.Context) error { return e.send(c, "/v1/rearm") }},
		},
	}
}

func policyCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:  "policy",
		Usage: "narrow an agent's scope for a time, with the signature of a controller",
		Subcommands: []*cli.Command{
			{Name: "sign", Usage: "sign a policy with a controller's key", Flags: documentFlags(12*time.Hour,
				&cli.StringFlag{Name: "scope", Usage: "YAML or JSON `FILE` with the policy's scope; it has neither controllers nor os"},
				&cli.UintFlag{Name: "version", Usage: "`NUMBER`, higher than that of every policy before it"}),
				Action: func(c *cli.Context) error {
					s, err := e.readScope(c)
					if err != nil {
						return err
					}
					if v := c.Uint("version"); v == 0 || v > 1<<32-1 {
						return usage("--version: 1 to %d is expected", uint32(1<<32-1))
					}
					return e.document(c, func(key crypto.Signer, agent string, issued, expires time.Time) (string, error) {
						return scope.SignPolicy(key, agent, uint32(c.Uint("version")), s, issued, expires)
					})
				}},
			{Name: "check", Usage: "say whether a policy is one for a scope, and what it allows; exit code 3 when it is not", Flags: []cli.Flag{documentFlag(), jsonFlag(),
				&cli.StringFlag{Name: "scope", Usage: "YAML or JSON `FILE` with the scope of the agent's certificate"}},
				Action: func(c *cli.Context) error { return policyCheck(e, c) }},
			{Name: "send", Usage: "hand the policy to the signer on this host; exit code 3 when it is refused", Flags: []cli.Flag{socketFlag(), documentFlag(), jsonFlag()},
				Action: func(c *cli.Context) error { return e.send(c, "/v1/policy") }},
		},
	}
}

// checkedPolicy is what policy check prints in JSON.
type checkedPolicy struct {
	Agent       string       `json:"agent"`
	Version     uint32       `json:"version"`
	Expires     time.Time    `json:"expires"`
	SHA256      scope.Digest `json:"sha256"`
	Description []string     `json:"description"`
}

func policyCheck(e *env, c *cli.Context) error {
	cert, err := e.readScope(c)
	if err != nil {
		return err
	}
	file, err := required(c, "document")
	if err != nil {
		return err
	}
	text, err := e.readDocument(file)
	if err != nil {
		return err
	}
	p, err := scope.ParsePolicy(text)
	if err != nil {
		return withCode(exitRefused, fmt.Errorf("%s: %w", scope.RuleControlForm, err))
	}
	s, r := p.Within(cert)
	if r == nil {
		r = p.Holds(p.Agent(), time.Now())
	}
	if r != nil {
		return withCode(exitRefused, r)
	}
	out := checkedPolicy{p.Agent(), p.Version(), p.Expires(), p.Hash(), s.Describe()}
	return e.show(c, out, func() {
		e.printf("policy %d of %s, until %s:\n", out.Version, out.Agent, out.Expires.Format(time.RFC3339))
		for _, line := range out.Description {
			e.printf("  %s\n", line)
		}
	})
}

func overrideCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:  "override",
		Usage: "lift a soft limit for one action, with the signature of a controller",
		Subcommands: []*cli.Command{{Name: "sign", Usage: "sign an override with a controller's key; it goes with the action to the signer", Flags: documentFlags(10*time.Minute,
			&cli.StringFlag{Name: "action", Usage: "JSON `FILE` with the action, its id included; - is standard input"},
			&cli.StringFlag{Name: "rule", Usage: "`NAME` of the limit, as in the refusal"},
			&cli.StringFlag{Name: "reason", Usage: "`WHY`, for the record"}),
			Action: func(c *cli.Context) error {
				rule, err := required(c, "rule")
				if err != nil {
					return err
				}
				return e.authorize(c, scope.Rule(rule))
			}}},
	}
}

func approvalCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:  "approval",
		Usage: "approve one action above human_approval_above, with the signature of a controller",
		Subcommands: []*cli.Command{{Name: "sign", Usage: "sign an approval with a controller's key; it goes with the action to the signer", Flags: documentFlags(10*time.Minute,
			&cli.StringFlag{Name: "action", Usage: "JSON `FILE` with the action, its id included; - is standard input"},
			&cli.StringFlag{Name: "reason", Usage: "`WHY`, for the record"}),
			Action: func(c *cli.Context) error { return e.authorize(c, scope.RuleApproval) }}},
	}
}

func (e *env) authorize(c *cli.Context, rule scope.Rule) error {
	path, err := required(c, "action")
	if err != nil {
		return err
	}
	reason, err := required(c, "reason")
	if err != nil {
		return err
	}
	b, err := e.readInput(path, scope.MaxAction)
	if err != nil {
		return err
	}
	action, err := scope.ParseAction(b)
	if err != nil {
		return withCode(exitRefused, err)
	}
	return e.document(c, func(key crypto.Signer, agent string, issued, expires time.Time) (string, error) {
		return scope.SignAuthorization(key, agent, action, rule, reason, issued, expires)
	})
}

func scopeKey(e *env, c *cli.Context) error {
	uri, err := required(c, "key")
	if err != nil {
		return err
	}
	key, closer, err := keyuri.Open(uri)
	if err != nil {
		return err
	}
	public, ok := key.Public().(*ecdsa.PublicKey)
	if err := closer.Close(); err != nil {
		return err
	}
	if !ok {
		return errors.New("a controller's key is on P-256")
	}
	text, err := scope.ControllerKey(public)
	if err != nil {
		return err
	}
	return e.show(c, map[string]string{"key": text}, func() { e.printf("%s\n", text) })
}
