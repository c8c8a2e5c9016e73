package scope

import (
	"errors"
	"fmt"
)

// Rules of the clock.
const (
	// RuleClockDivergence refuses all but cancels while the signer's clock may be
	// further from UTC than the scope allows, or nobody knows how far.
	RuleClockDivergence Rule = "max_clock_divergence_us"
	// RuleClockJump refuses all but cancels after the signer's clock was set.
	RuleClockJump Rule = "clock_jump"
)

// Clock is what the signer says of its clock at an action. No clock in a
// statement: it did not know.
type Clock struct {
	Source     string `json:"src"`    // who keeps it: [ClockChrony] or [ClockKernel]
	Divergence uint64 `json:"div_us"` // from UTC, at most, in microseconds, as the source estimates it
}

// Sources of the clock's state.
const (
	ClockChrony = "chrony" // chronyd's own bound of its error
	ClockKernel = "kernel" // the kernel's, which whoever disciplines the clock keeps (adjtimex)
)

// maxDivergence bounds what a statement says, in microseconds: a day.
const maxDivergence = 86_400_000_000

func (c *Clock) validate() error {
	if c == nil {
		return nil
	}
	if c.Source != ClockChrony && c.Source != ClockKernel || c.Divergence > maxDivergence {
		return errors.New("statement: clk: a source, chrony or kernel, and a divergence of at most a day are expected")
	}
	return nil
}

func (p *Permit) checkClock() *Refusal {
	return p.env.Clock.Refuses(p.action, uint64(p.scope.doc.ClockDivergence))
}

// ReducesRisk says whether the action is a cancel (rule G7).
func (a *Action) ReducesRisk() bool { return a.Kind.reducesRisk() }

// Refuses says why an action is refused under a bound in microseconds; nil if it
// is not. No bound is 0; a nil clock is not known.
func (c *Clock) Refuses(a *Action, max uint64) *Refusal {
	switch {
	case max == 0 || a.ReducesRisk():
		return nil
	case c == nil:
		return &Refusal{Rule: RuleClockDivergence, Limit: fmt.Sprint(max), Message: fmt.Sprintf("how far the signer's clock is from UTC is not known, at most %d µs are allowed: see that chrony or a PTP client runs", max)}
	case c.Divergence > max:
		return &Refusal{Rule: RuleClockDivergence, Value: fmt.Sprint(c.Divergence), Limit: fmt.Sprint(max), Excess: fmt.Sprint(c.Divergence - max),
			Message: fmt.Sprintf("the signer's clock may be %d µs from UTC (%s), at most %d µs are allowed", c.Divergence, c.Source, max)}
	}
	return nil
}
