package main

import (
	"fmt"
	"io"
	"math"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/urfave/cli/v2"

	"inkan/audit"
	"inkan/scope"
	"inkan/signer"
)

func statusCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:  "status",
		Usage: "show an operator what the agents of a signer have used of their limits, their devices and certificates",
		Flags: []cli.Flag{socketFlag(), jsonFlag(),
			&cli.BoolFlag{Name: "watch", Usage: "show it again and again, until interrupted"},
			&cli.DurationFlag{Name: "every", Value: time.Second, Usage: "with --watch: `TIME` between two looks"}},
		Action: func(c *cli.Context) error {
			to, err := theSigner(c)
			if err != nil {
				return err
			}
			every := max(c.Duration("every"), 100*time.Millisecond)
			ctx := interrupted(c)
			for {
				var s signer.Status
				if err := to.Get(ctx, "/v1/status", &s); err != nil {
					if ctx.Err() != nil {
						return nil
					}
					return refusedOr(err)
				}
				if c.Bool("watch") && !c.Bool("json") {
					e.printf("\x1b[H\x1b[2J") // the screen from its first line on
				}
				if err := e.show(c, s, func() { printStatus(e.stdout, &s) }); err != nil || !c.Bool("watch") {
					return err
				}
				select {
				case <-ctx.Done():
					return nil
				case <-time.After(every):
				}
			}
		},
	}
}

func printStatus(w io.Writer, s *signer.Status) {
	fmt.Fprintf(w, "clock  %s\n\n", describeClock(&s.Clock))
	for i, a := range s.Agents {
		if i > 0 {
			fmt.Fprintln(w)
		}
		fmt.Fprintf(w, "%s  %s\n", a.Name, a.ID)
		if a.Error != "" {
			fmt.Fprintf(w, "  SIGNS NOTHING: %s\n", a.Error)
		}
		if !a.NotAfter.IsZero() {
			fmt.Fprintf(w, "  certificate  until %s (%s)\n", a.NotAfter.Format(time.RFC3339), remaining(a.NotAfter.Sub(s.Time)))
		}
		fmt.Fprintf(w, "  record       %d entries\n", a.Entries)
		fmt.Fprintf(w, "  rollback     %s\n", describeAnchoring(&a.Rollback))
		if d := a.Device; d != nil {
			fmt.Fprintf(w, "  device       %s\n", describeDevice(d))
		}
		printReserve(w, a.Reserve)
		printControls(w, &a)
		width := 0
		for _, u := range a.Utilisation {
			width = max(width, utf8.RuneCountInString(limitName(u)))
		}
		for _, u := range a.Utilisation {
			disabled := ""
			if u.Disabled {
				disabled = "  DISABLED until it is re-armed"
			}
			fmt.Fprintf(w, "  %-*s  %s %3.0f %%  %s of %s%s\n", width, limitName(u), bar(u.Ratio()), math.Floor(100*u.Ratio()), u.Used, u.Of, disabled)
		}
	}
}

func describeClock(c *signer.ClockStatus) string {
	switch {
	case c.Jump != "":
		return "ONLY CANCELS PASS: " + c.Jump + "; inkan signer recover accepts it as it is"
	case c.Clock == nil:
		return "its divergence from UTC is not known: " + c.Error
	}
	return fmt.Sprintf("at most %s from UTC (%s)", time.Duration(c.Divergence)*time.Microsecond, c.Source)
}

func describeAnchoring(a *audit.Anchoring) string {
	switch {
	case !a.Bound:
		return "not protected: the record is bound to no TPM"
	case a.Finding != nil:
		return "found (" + string(a.Finding.Cause) + "): inkan signer recover takes the record up again"
	case a.Error != "":
		return fmt.Sprintf("%d entries are bound to the TPM's counter; the last try failed: %s", a.Entries, a.Error)
	}
	return fmt.Sprintf("%d entries are bound to the TPM's counter, which is %d", a.Entries, a.Value)
}

// printReserve says what stands in for approvers.
func printReserve(w io.Writer, r *signer.ReserveStatus) {
	switch {
	case r == nil:
	case r.InUse:
		fmt.Fprintf(w, "  reserve      IN USE, NO APPROVER ANSWERS; consent until %s\n", r.Until.Format(time.RFC3339))
	case time.Now().Before(r.Until):
		fmt.Fprintf(w, "  reserve      consent until %s\n", r.Until.Format(time.RFC3339))
	default:
		fmt.Fprintf(w, "  reserve      NO CONSENT: see the signer's log\n")
	}
}

// printControls says what is in force beside the certificate.
func printControls(w io.Writer, a *signer.AgentStatus) {
	for _, k := range a.Controls.Kills {
		what := "ONLY CANCELS PASS"
		if k.Venue != "" {
			what += " at " + k.Venue
		}
		fmt.Fprintf(w, "  %s: killed (%s) since %s by %s: %s (entry %d)\n", what, k.Scope, k.Since.Time.Format(time.RFC3339), k.By, k.Reason, k.Event)
	}
	if p := a.Controls.Policy; p != nil {
		fmt.Fprintf(w, "  policy       version %d until %s (entry %d)\n", p.Version, p.Expires.Format(time.RFC3339), p.Event)
		if p.Error != "" {
			fmt.Fprintf(w, "  ONLY CANCELS PASS: %s\n", p.Error)
		}
	}
	if a.PolicyError != "" {
		fmt.Fprintf(w, "  policy file  NOT TAKEN OVER: %s\n", a.PolicyError)
	}
}

func remaining(d time.Duration) string {
	if d <= 0 {
		return "over"
	}
	return d.Truncate(time.Minute).String() + " left"
}

func limitName(u scope.Utilisation) string {
	name := string(u.Limit)
	if u.Key != "" {
		name += " " + u.Key
	}
	return name + ", " + u.Window.String()
}

// barWidth is the width of a bar in characters.
const barWidth = 24

// bar shows a part of 1. Anything used shows, and only what is full looks full.
func bar(ratio float64) string {
	n := int(math.Ceil(min(max(ratio, 0), 1) * barWidth))
	if ratio < 1 {
		n = min(n, barWidth-1)
	}
	return "[" + strings.Repeat("#", n) + strings.Repeat(".", barWidth-n) + "]"
}

func describeDevice(d *signer.DeviceStatus) string {
	if d.Kind != "pkcs11" {
		return d.Kind
	}
	worker := "no worker"
	if d.WorkerPID != 0 {
		worker = fmt.Sprintf("worker %d", d.WorkerPID)
	}
	s := fmt.Sprintf("pkcs11, %s (generation %d), %d sessions, breaker %s, %.2f ms a signature, %d signatures, %d failures",
		worker, d.Generation, d.Sessions, d.Breaker, 1000*d.LatencySeconds, d.Signatures, d.Failures)
	if d.LastError != "" {
		s += "; last: " + d.LastError
	}
	return s
}
