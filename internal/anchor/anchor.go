// Package anchor binds records (package audit) to counters in a TPM (package tpm).
package anchor

import (
	"errors"
	"fmt"

	"inkan/audit"
	"inkan/tpm"
)

type anchor struct{ counter *tpm.Counter }

// New returns the anchor of the record of the agent with a name.
func New(d *tpm.Device, agent string) audit.Anchor { return anchor{d.Counter(agent)} }

func (a anchor) Read() (audit.Reading, error) {
	r, err := a.counter.Read()
	return audit.Reading(r), missing(err)
}

func (a anchor) Make() error { return a.counter.Make() }

func (a anchor) Advance(from, target uint64) (uint64, bool, error) {
	v, moved, err := a.counter.Advance(from, target)
	return v, moved, missing(err)
}

func missing(err error) error {
	if errors.Is(err, tpm.ErrNoCounter) {
		return fmt.Errorf("%w: %w", audit.ErrNoAnchor, err)
	}
	return err
}
