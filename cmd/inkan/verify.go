package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/urfave/cli/v2"

	"inkan/internal/strictjson"
	"inkan/scope"
	"inkan/verify"
	"inkan/verify/binding"
	"inkan/verify/source"
)

func verifyCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:  "verify",
		Usage: "verify a signed action as a venue does; exit code 4 when it is refused",
		Flags: []cli.Flag{
			jsonFlag(),
			&cli.StringFlag{Name: "ca", Usage: "PEM `FILE` with the CA certificate"},
			&cli.StringSliceFlag{Name: "audience", Usage: "who this venue is: a `MIC`, or lei: and an LEI"},
			&cli.StringFlag{Name: "jws", Usage: "`FILE` with the signed action; - is standard input"},
			&cli.StringFlag{Name: "crl", Usage: "`FILE` with the revocation list"},
			&cli.StringFlag{Name: "crl-url", Usage: "`URL` of the revocation list"},
			&cli.StringFlag{Name: "ocsp-url", Usage: "`URL` of the OCSP responder"},
			&cli.BoolFlag{Name: "no-revocation", Usage: "do not ask whether the certificate was revoked"},
			&cli.DurationFlag{Name: "max-revocation-age", Value: time.Hour, Usage: "oldest `AGE` of what is known about revocation"},
			&cli.StringFlag{Name: "body", Usage: "`FILE` with the HTTP body that arrived with it"},
			&cli.StringFlag{Name: "fix", Usage: "`FILE` with a FIX message that carries the action, instead of --jws; every field of it is compared with the action"},
			&cli.IntSliceFlag{Name: "free-tag", Usage: "FIX `TAG` that is not compared; may be given several times"},
			&cli.StringFlag{Name: "frame", Usage: "`FILE` with a WebSocket's text that carries the action, instead of --jws"},
			&cli.StringFlag{Name: "replay-db", Usage: "`FILE` that remembers what was accepted, or URL of a PostgreSQL database; without it neither a replay nor a limit over time is noticed"},
			&cli.StringFlag{Name: "replay-db-password-file", Usage: "`FILE` with the password of the database's user"},
			&cli.StringFlag{Name: "policies", Usage: "`DIRECTORY` with policies, or base URL; without it actions under a policy are refused"},
			&cli.StringFlag{Name: "reference", Usage: "JSON `FILE` with this venue's reference price"},
			&cli.BoolFlag{Name: "accept-reference", Usage: "believe the signer's reference price"},
			&cli.StringFlag{Name: "source-address", Usage: "`ADDRESS` that it came from; without it a scope that names networks or regions refuses"},
			&cli.StringFlag{Name: "regions", Usage: "geofeed (.csv) or MMDB (.mmdb) `FILE` that says where addresses are"},
			&cli.TimestampFlag{Name: "at", Layout: time.RFC3339, Usage: "verify as of this `TIME`"},
		},
		Action: func(c *cli.Context) error { return runVerify(e, c) },
	}
}

func revocation(c *cli.Context) (verify.Revocation, error) {
	given := 0
	var out verify.Revocation
	age := c.Duration("max-revocation-age")
	if path := c.String("crl"); path != "" {
		given++
		out = &verify.CRL{MaxAge: age, Load: func(context.Context) ([]byte, error) { return os.ReadFile(path) }}
	}
	if url := c.String("crl-url"); url != "" {
		given++
		out = &verify.CRL{MaxAge: age, Load: verify.HTTPLoader(url)}
	}
	if url := c.String("ocsp-url"); url != "" {
		given++
		out = &verify.OCSP{MaxAge: age, URL: url}
	}
	if c.Bool("no-revocation") {
		given++
		out = verify.NoRevocation{}
	}
	if given != 1 {
		return nil, usage("give one of --crl, --crl-url, --ocsp-url and --no-revocation")
	}
	return out, nil
}

func runVerify(e *env, c *cli.Context) error {
	ca, err := required(c, "ca")
	if err != nil {
		return err
	}
	carrier, path, err := carrierOf(c)
	if err != nil {
		return err
	}
	if len(c.StringSlice("audience")) == 0 {
		return usage("--audience is missing")
	}
	config := verify.Config{Audiences: c.StringSlice("audience"), Replay: verify.NoReplay{}, AcceptReference: c.Bool("accept-reference"), Policies: policySource(c.String("policies"))}
	if config.Roots, err = readPool(ca); err != nil {
		return err
	}
	if config.Revocation, err = revocation(c); err != nil {
		return err
	}
	if at := c.Timestamp("at"); at != nil {
		config.Now = func() time.Time { return *at }
	}
	if db := c.String("replay-db"); db != "" {
		s, err := openReplay(c.Context, "--replay-db", db, c.String("replay-db-password-file"), ".")
		if err != nil {
			return err
		}
		defer s.Close()
		config.Replay = s
	}
	if ref := c.String("reference"); ref != "" {
		b, err := e.readInput(ref, scope.MaxAction)
		if err != nil {
			return err
		}
		var p scope.ReferencePrice
		if err := strictjson.Unmarshal(b, scope.MaxAction, &p); err != nil {
			return err
		}
		config.References = func(instrument string) *scope.ReferencePrice {
			if instrument != p.Instrument {
				return nil
			}
			return &p
		}
	}
	var body *verify.Body
	if f := c.String("body"); f != "" {
		b, err := e.readInput(f, 16<<20)
		if err != nil {
			return err
		}
		body = &verify.Body{Format: scope.NativeHTTPBody, SHA256: sha256.Sum256(b)}
	}
	arrived := verify.Arrival{Body: body}
	if text := c.String("source-address"); text != "" {
		if arrived.From, err = sourceAddress(text); err != nil {
			return err
		}
	}
	if file := c.String("regions"); file != "" {
		if config.Regions, err = source.Open(file); err != nil {
			return err
		}
	}
	r, err := verify.NewReceiver(config)
	if err != nil {
		return err
	}
	b, err := e.readInput(path, binding.MaxFrame)
	if err != nil {
		return err
	}
	v, resend, err := accept(c, r, carrier, b, arrived)
	if err != nil {
		refusal, ok := errors.AsType[*verify.Refusal](err)
		if ok && refusal.Cause != nil { // who runs this is who may see it
			refusal = &verify.Refusal{Reason: refusal.Reason, Detail: fmt.Sprintf("%s (%v)", refusal.Detail, refusal.Cause)}
			err = refusal
		}
		if ok && c.Bool("json") {
			if err := e.printJSON(map[string]any{"accepted": false, "refusal": refusal}); err != nil {
				return err
			}
		}
		return withCode(exitUnproven, err)
	}
	if resend {
		return e.show(c, map[string]any{"accepted": true, "resend": true}, func() {
			e.printf("a resend: the message may have been sent before (PossDupFlag), it verifies, and its action was accepted before; it must not be acted on again\n")
		})
	}
	return e.show(c, map[string]any{"accepted": true, "agent": v.Agent, "statement": v.Statement}, func() {
		st := v.Statement
		e.printf("accepted: %s by %s, number %d at %s\n", st.Kind, v.Agent, st.Counter, st.Time.Time.Format(scope.TimeFormat))
		if o := st.Order; o != nil {
			e.printf("  order %s: side %s, %s of %s at %s %s on %s\n", o.ClOrdID, o.Side, text(o.OrderQty), v.Action.Instrument(), text(o.Price), o.Currency, st.Audience)
		}
		e.printf("  under this scope:\n")
		for _, line := range v.Scope.Describe() {
			e.printf("    %s\n", line)
		}
		if c.String("replay-db") == "" {
			e.printf("  note: without --replay-db neither a second use nor a limit over time is noticed\n")
		}
	})
}

// carrierOf returns the one flag that says what the action is in, and its file.
func carrierOf(c *cli.Context) (name, path string, err error) {
	for _, n := range []string{"jws", "fix", "frame"} {
		if v := c.String(n); v != "" && name != "" {
			return "", "", usage("give one of --jws, --fix and --frame")
		} else if v != "" {
			name, path = n, v
		}
	}
	switch {
	case name == "":
		return "", "", usage("--jws is missing, or --fix, or --frame")
	case name != "jws" && c.String("body") != "":
		return "", "", usage("--body goes with --jws")
	}
	return name, path, nil
}

// accept has the receiver accept what the carrier holds.
func accept(c *cli.Context, r *verify.Receiver, carrier string, b []byte, arrived verify.Arrival) (v *verify.Verified, resend bool, err error) {
	var a *binding.Accepted
	switch carrier {
	case "fix":
		a, err = binding.FIX(c.Context, r, arrived.From, b, &binding.Profile{Free: c.IntSlice("free-tag")})
	case "frame":
		// What a venue's own messages say only the venue knows.
		a, err = binding.Text(c.Context, r, arrived.From, b, func(*scope.Action, []byte) error { return nil })
	default:
		v, err = r.VerifyArrival(c.Context, bytes.TrimSpace(b), arrived)
		return v, false, err
	}
	if err != nil {
		return nil, false, err
	}
	return a.Verified, a.Resend, nil
}
