package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v2"

	"inkan/internal/problem"
	"inkan/internal/strictjson"
	"inkan/scope"
)

// Exit codes; README.md lists them.
const (
	exitError    = 1
	exitUsage    = 2
	exitRefused  = 3 // refused by a rule
	exitUnproven = 4 // verification failed
)

// env is what a command may use of the outside.
type env struct {
	stdin          io.Reader
	stdout, stderr io.Writer

	asJSON  bool // the command was given --json
	printed bool // and has printed its document
}

// exit is an error with the code that the process ends with.
type exit struct {
	code int
	err  error
}

func (e *exit) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}
func (e *exit) Unwrap() error { return e.err }

// withCode marks err with an exit code; nil stays nil.
func withCode(code int, err error) error {
	if err == nil {
		return nil
	}
	return &exit{code, err}
}

// usage is an error in how the command was called.
func usage(format string, a ...any) error { return withCode(exitUsage, fmt.Errorf(format, a...)) }

// printJSON writes v as one JSON document on standard output.
func (e *env) printJSON(v any) error {
	b, err := strictjson.Marshal(v)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(e.stdout, "%s\n", b)
	e.printed = true
	return err
}

// failure is the document that a command with --json prints if it has no result.
type failure struct {
	Error    string           `json:"error"`
	ExitCode int              `json:"exit_code"`
	Rule     string           `json:"rule,omitempty"`    // that refused
	Problem  *problem.Problem `json:"problem,omitempty"` // what a server answered
}

// fail says why a command failed, and returns the exit code.
func (e *env) fail(err error) int {
	code := exitError
	if x, ok := errors.AsType[*exit](err); ok {
		code = x.code
		if x.err == nil { // another process has said why
			return code
		}
	}
	// Errors say what stands in files and answers of others.
	lines := strings.Split(err.Error(), "\n")
	for i := range lines {
		lines[i] = oneLine(lines[i])
	}
	fmt.Fprintf(e.stderr, "inkan: %s\n", strings.Join(lines, "\n"))
	if e.asJSON && !e.printed {
		f := failure{Error: err.Error(), ExitCode: code}
		if p, ok := errors.AsType[*problem.Problem](err); ok {
			f.Problem, f.Rule = p, p.Rule
		} else if r, ok := errors.AsType[*scope.Refusal](err); ok {
			f.Rule = string(r.Rule)
		}
		if err := e.printJSON(f); err != nil {
			fmt.Fprintf(e.stderr, "inkan: %v\n", err)
		}
	}
	return code
}

// jsonFlag is on every command that prints a result.
func jsonFlag() *cli.BoolFlag {
	return &cli.BoolFlag{Name: "json", Usage: "print the result as one JSON document"}
}

func newApp(e *env) *cli.App {
	app := &cli.App{
		Name:                      "inkan",
		Usage:                     "sign what a trading agent does, with a key that never leaves its machine",
		Reader:                    e.stdin,
		Writer:                    e.stdout,
		ErrWriter:                 e.stderr,
		HideHelpCommand:           true,
		DisableSliceFlagSeparator: true,
		ExitErrHandler:            func(*cli.Context, error) {},
		Commands:                  commands(e),
	}
	app.Action = func(c *cli.Context) error {
		if c.Args().Present() {
			return usage("unknown command %q: inkan --help lists the commands", c.Args().First())
		}
		return cli.ShowAppHelp(c)
	}
	app.OnUsageError = onUsageError
	e.harden(app.Commands)
	return app
}

// harden gives every command the rules that the library does not inherit:
// flag errors become usage errors, and arguments are refused, since flags
// after a first argument would silently become arguments. It notes --json.
func (e *env) harden(cmds []*cli.Command) {
	for _, c := range cmds {
		c.HideHelpCommand = true
		c.OnUsageError = onUsageError
		if c.Action == nil {
			c.Action = func(x *cli.Context) error {
				if x.Args().Present() {
					return usage("unknown command %q: %s --help lists the commands", x.Args().First(), x.Command.HelpName)
				}
				return cli.ShowSubcommandHelp(x)
			}
		} else if !c.SkipFlagParsing {
			action, takesArguments := c.Action, c.ArgsUsage != ""
			c.Action = func(x *cli.Context) error {
				e.asJSON = x.Bool("json")
				if x.Args().Present() && !takesArguments {
					return usage("unexpected argument %q: this command takes flags only", x.Args().First())
				}
				return action(x)
			}
		}
		e.harden(c.Subcommands)
	}
}

func onUsageError(_ *cli.Context, err error, _ bool) error { return withCode(exitUsage, err) }

// run is the whole command; it returns the exit code.
func run(ctx context.Context, args []string, e *env) int {
	err := newApp(e).RunContext(ctx, args)
	if err == nil {
		return 0
	}
	return e.fail(err)
}
