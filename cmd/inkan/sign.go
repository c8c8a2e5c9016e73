package main

import (
	"errors"

	"github.com/urfave/cli/v2"

	"inkan/internal/problem"
	"inkan/scope"
)

func signCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:  "sign",
		Usage: "have an action signed; exit code 3 when it is refused",
		Flags: signerFlags(jsonFlag(),
			&cli.StringFlag{Name: "action", Usage: "JSON `FILE` with the action; - is standard input"},
			&cli.StringSliceFlag{Name: "authorization", Usage: "`FILE` with an override or approval of exactly this action; may be given several times"},
			&cli.BoolFlag{Name: "new-id", Usage: "give the action a fresh id, whatever the file has"},
		),
		Action: func(c *cli.Context) error {
			path, err := required(c, "action")
			if err != nil {
				return err
			}
			b, err := e.readInput(path, scope.MaxAction)
			if err != nil {
				return err
			}
			if c.Bool("new-id") {
				if b, err = withNewID(b); err != nil {
					return err
				}
			}
			to, err := theSigner(c)
			if err != nil {
				return err
			}
			var authorizations []string
			for _, path := range c.StringSlice("authorization") {
				text, err := e.readDocument(path)
				if err != nil {
					return err
				}
				authorizations = append(authorizations, text)
			}
			signed, err := to.SignJSON(c.Context, b, authorizations...)
			if err != nil {
				return refusedOr(err)
			}
			return e.show(c, signed, func() { e.printf("%s\n", signed.JWS) })
		},
	}
}

// refusedOr gives a refusal of the signer its exit code.
func refusedOr(err error) error {
	if p, ok := errors.AsType[*problem.Problem](err); ok && p.Rule != "" {
		return withCode(exitRefused, err)
	}
	return err
}
