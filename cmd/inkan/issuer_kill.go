package main

import (
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"inkan/issuer"
	"inkan/scope"
)

// issuerKillCommand is what administrators stop: docs/controls.md.
func issuerKillCommand(e *env) *cli.Command {
	return &cli.Command{
		Name: "kill", Usage: "stop agents at all signers and receivers that look at the issuer's list", Subcommands: []*cli.Command{
			{Name: "add", Usage: "stop an agent, a venue or all agents", Flags: adminFlags(
				&cli.StringFlag{Name: "scope", Value: "agent", Usage: "`WHAT` is stopped: agent, venue or firm"},
				&cli.StringFlag{Name: "agent", Usage: "`NAME` of the agent"},
				&cli.StringFlag{Name: "venue", Usage: "`MIC` of the venue, or lei: and its LEI"},
				&cli.StringFlag{Name: "reason", Usage: "`WHY`, for the record"}),
				Action: func(c *cli.Context) error {
					reason, err := required(c, "reason")
					if err != nil {
						return err
					}
					cl, err := adminClient(c)
					if err != nil {
						return err
					}
					k, err := cl.Kill(c.Context, issuer.KillOrder{Scope: scope.KillScope(c.String("scope")), Agent: c.String("agent"), Venue: c.String("venue"), Reason: reason})
					if err != nil {
						return err
					}
					return e.show(c, k, func() { e.printf("%s\n", k.ID) })
				}},
			{Name: "list", Usage: "list the kills in force", Flags: adminFlags(), Action: func(c *cli.Context) error {
				cl, err := adminClient(c)
				if err != nil {
					return err
				}
				list, err := cl.Kills(c.Context)
				if err != nil {
					return err
				}
				return e.show(c, list, func() {
					e.table("ID\tSCOPE\tAGENT\tVENUE\tSINCE\tREASON", func(w *tabwriter.Writer) {
						for _, k := range list {
							fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", k.ID, k.Scope, k.Agent, k.Venue, k.Since.Format(time.RFC3339), k.Reason)
						}
					})
				})
			}},
			{Name: "lift", Usage: "take a kill off the list; signers stay stopped until they are re-armed", Flags: adminFlags(&cli.StringFlag{Name: "id", Usage: "`ID` of the kill"}),
				Action: func(c *cli.Context) error {
					id, err := required(c, "id")
					if err != nil {
						return err
					}
					cl, err := adminClient(c)
					if err != nil {
						return err
					}
					return cl.LiftKill(c.Context, id)
				}},
		}}
}
