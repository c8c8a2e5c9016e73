package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
)

// family is a group of attacks on one layer. Its run sets up in w what it
// needs, carries each attack out with w.attack, and leaves nothing behind but what w.end removes.
type family struct {
	name  string
	about string
	run   func(ctx context.Context, w *world) error
}

// families are all attacks. A family has a file of its own: attack_NAME.go.
var families = []family{
	{"os", "from inside a confined agent", attackOS},
	{"network", "on the wire: the agent unconfined, every action properly signed", attackNetwork},
	{"application", "on the signed action: the agent unconfined, on its own TLS connection", attackApplication},
	{"source", "from another address, with the agent's own key, certificate and orders", attackSource},
	{"limits", "an agent that wants more than its limits give", attackLimits},
	{"controls", "an agent, or who has a key that may less, against policy, override, approval, kill and re-arm", attackControls},
	{"books", "root signs with the agent's key in local mode, and the issuer at the renewal, or an auditor, looks afterwards", attackBooks},
	{"rollback", "somebody who has the signer's files", attackRollback},
	{"root", "root on the host of an agent in approver mode, against the TPM and the approver", attackRoot},
	{"reserve", "no approver answers: the agent, and root on its host, want more than the reserve gives", attackReserve},
}

func familyNames() string {
	var names []string
	for _, f := range families {
		names = append(names, f.name)
	}
	return strings.Join(names, ", ")
}

// runAttack carries out the families named, all if none is, and fails unless
// all attacks were refused.
func runAttack(ctx context.Context, out io.Writer, inkan string, names []string, asJSON bool) error {
	for _, n := range names {
		if !slices.ContainsFunc(families, func(f family) bool { return f.name == n }) {
			return fmt.Errorf("--family %s: there are %s", n, familyNames())
		}
	}
	total := &demo{out: out, quiet: asJSON}
	for _, f := range families {
		if len(names) > 0 && !slices.Contains(names, f.name) {
			continue
		}
		total.title("%s: %s", f.name, f.about)
		if err := func() error {
			w, err := newWorld(out, inkan, asJSON)
			if err != nil {
				return err
			}
			defer w.end()
			w.layer = f.name
			err = f.run(ctx, w)
			total.rows = append(total.rows, w.rows...)
			return err
		}(); err != nil {
			return fmt.Errorf("attacks on %s: %w", f.name, err)
		}
	}
	return total.finish()
}
