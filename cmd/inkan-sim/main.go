// Command inkan-sim keeps software devices up for test runs, and runs the
// demo, the benchmarks and the crash test. It is not for production: it is the
// only command that links the simulator.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"inkan/simulator"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := newApp(os.Stdout, os.Stderr).RunContext(ctx, os.Args)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "inkan-sim: %v\n", err)
		os.Exit(1)
	}
}

func newApp(stdout, stderr io.Writer) *cli.App {
	inkan := &cli.StringFlag{Name: "inkan", Value: "inkan", Usage: "the command under test: `FILE`"}
	asJSON := &cli.BoolFlag{Name: "json", Usage: "print the result as one JSON document"}
	dir := &cli.StringFlag{Name: "dir", Usage: "`DIRECTORY` for state; it is kept", Required: true}
	app := &cli.App{
		Name: "inkan-sim", Usage: "software devices for test runs; not for production",
		Writer: stdout, ErrWriter: stderr, HideHelpCommand: true, ExitErrHandler: func(*cli.Context, error) {},
		Commands: []*cli.Command{
			{Name: "tpm", Usage: "keep a software TPM up until interrupted; print where it is as JSON", Flags: []cli.Flag{dir}, Action: func(c *cli.Context) error { return runTPM(c.Context, stdout, c.String("dir")) }},
			{Name: "softhsm", Usage: "make a SoftHSM token; print its URI and where it is as JSON", Flags: []cli.Flag{dir}, Action: func(c *cli.Context) error {
				s, err := simulator.NewSoftHSM(c.Context, c.String("dir"))
				if err != nil {
					return err
				}
				return printJSON(stdout, map[string]string{"token": "pkcs11:token=" + s.Label + "?module-path=" + s.Module + "&pin-source=file:" + s.PINFile, "module": s.Module, "config": s.Config, "label": s.Label, "pin_file": s.PINFile})
			}},
			{Name: "demo", Usage: "from a bare host to a verified order, then attacks", Flags: []cli.Flag{inkan, asJSON, &cli.BoolFlag{Name: "hsm", Usage: "the action key is in a PKCS#11 token (SoftHSM), the host attested by its TPM"},
				&cli.BoolFlag{Name: "approver", Usage: "the action key is in approver mode; the attacks are those of root on the host"}}, Action: func(c *cli.Context) error {
				return runDemo(c.Context, stdout, c.String("inkan"), c.Bool("hsm"), c.Bool("approver"), c.Bool("json"))
			}},
			{Name: "bench", Usage: "speed beside the raw device and the standard library", Flags: []cli.Flag{inkan, asJSON, &cli.DurationFlag{Name: "time", Value: 3 * time.Second, Usage: "`DURATION` of each measurement"},
				&cli.StringSliceFlag{Name: "only", Usage: "only these `SECTIONS`: " + sectionNames()}}, Action: func(c *cli.Context) error {
				return runBench(c.Context, stdout, c.String("inkan"), c.Duration("time"), c.StringSlice("only"), c.Bool("json"))
			}},
			{Name: "bench-start", Usage: "how long it takes to open a long record", Flags: []cli.Flag{asJSON, &cli.IntFlag{Name: "records", Value: 10_000_000, Usage: "`COUNT`, of one day; each takes about a kilobyte below TMPDIR"}}, Action: func(c *cli.Context) error {
				return runBenchStart(c.Context, stdout, c.Int("records"), c.Bool("json"))
			}},
			{Name: "attack", Usage: "attacks on each layer, with the others switched off; fails unless all are refused", Flags: []cli.Flag{inkan, asJSON, &cli.StringSliceFlag{Name: "family", Usage: "only these `NAMES`: " + familyNames()}}, Action: func(c *cli.Context) error {
				return runAttack(c.Context, stdout, c.String("inkan"), c.StringSlice("family"), c.Bool("json"))
			}},
			{Name: "probe", Hidden: true, Usage: "one attack from inside a confined agent", ArgsUsage: "NAME arguments", Action: func(c *cli.Context) error { return runProbe(stdout, c.Args().Slice()) }},
			{Name: "storm", Usage: "orders from many clients while the token with the key has its bad days", Flags: []cli.Flag{inkan, asJSON,
				&cli.IntFlag{Name: "orders", Value: 20000, Usage: "`COUNT`"}, &cli.IntFlag{Name: "clients", Value: 16, Usage: "`COUNT`"}, &cli.DurationFlag{Name: "hang", Value: time.Minute, Usage: "`DURATION` for which the module hangs"}},
				Action: func(c *cli.Context) error {
					return runStorm(c.Context, stdout, c.String("inkan"), c.Int("orders"), c.Int("clients"), c.Duration("hang"), c.Bool("json"))
				}},
			{Name: "crash", Usage: "orders from many clients while the signer is killed again and again", Flags: []cli.Flag{inkan, asJSON,
				&cli.IntFlag{Name: "orders", Value: 2000, Usage: "`COUNT`"}, &cli.IntFlag{Name: "clients", Value: 16, Usage: "`COUNT`"}, &cli.IntFlag{Name: "kills", Value: 5, Usage: "`COUNT`"}},
				Action: func(c *cli.Context) error {
					return runCrash(c.Context, stdout, c.String("inkan"), c.Int("orders"), c.Int("clients"), c.Int("kills"), c.Bool("json"))
				}},
		},
	}
	return app
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false) // a URI is copied as it stands
	return e.Encode(v)
}

func runTPM(ctx context.Context, stdout io.Writer, dir string) error {
	t, err := simulator.StartTPM(ctx, dir)
	if err != nil {
		return err
	}
	if err := printJSON(stdout, map[string]any{"address": t.Address, "ek_roots": t.RootsFile(), "ek_intermediates": t.IntermediatesFile(), "pid": t.PID()}); err != nil {
		return err
	}
	<-ctx.Done()
	return t.Close()
}
