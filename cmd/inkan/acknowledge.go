package main

import (
	"errors"
	"time"

	"github.com/urfave/cli/v2"

	"inkan/scope"
)

func acknowledgeCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:  "acknowledge",
		Usage: "tell a signer that an order has ended at its venue, so that it is not open any more; exit code 3 when it is refused",
		Flags: []cli.Flag{socketFlag(), jsonFlag(),
			&cli.StringFlag{Name: "agent", Usage: "`NAME` of the agent whose order it is"},
			&cli.StringFlag{Name: "venue", Usage: "`MIC` of the venue, or lei: and its LEI"},
			&cli.StringFlag{Name: "order", Usage: "`ClOrdID` of the order or replacement"},
			&cli.StringFlag{Name: "status", Usage: "how it ended: rejected, filled, cancelled or done"},
			&cli.TimestampFlag{Name: "at", Layout: time.RFC3339Nano, Usage: "`TIME` at the venue, now by default"}},
		Action: func(c *cli.Context) error {
			k := &scope.Acknowledgement{Time: scope.Timestamp{Time: time.Now().UTC().Truncate(time.Microsecond)}}
			if at := c.Timestamp("at"); at != nil {
				k.Time.Time = at.UTC().Truncate(time.Microsecond)
			}
			var agent, status string
			for name, to := range map[string]*string{"agent": &agent, "venue": &k.Venue, "order": &k.ClOrdID, "status": &status} {
				var err error
				if *to, err = required(c, name); err != nil {
					return err
				}
			}
			k.Status = scope.AckStatus(status)
			to, err := theSigner(c)
			if err != nil {
				return err
			}
			out, err := to.Acknowledge(c.Context, agent, k)
			if err != nil {
				return refusedOr(err)
			}
			if len(out) != 1 {
				return errors.New("the signer's answer is not to one acknowledgement")
			}
			if out[0].Rule != "" {
				return withCode(exitRefused, errors.New(string(out[0].Rule)+": "+out[0].Detail))
			}
			return e.show(c, out[0], func() { e.printf("entry %d: order %s at %s has ended\n", out[0].Counter, k.ClOrdID, k.Venue) })
		},
	}
}
