package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"inkan/scope"
	"inkan/signer/client"
	"inkan/simulator"
)

const rollbackScope = `version: 1
allowed_actions: [order.new]
allowed_venues: [XPAR]
allowed_instruments:
  - id: isin:FR0000120271
allowed_sides: ["1"]
allowed_ord_types: ["2"]
allowed_tif: ["0"]
max_order_notional:
  - {currency: EUR, amount: "25000"}
max_notional_per_window:
  - {currency: EUR, amount: "1000000", window: {rolling_s: 3600}}
`

// attackRollback: somebody who has the signer's files wants yesterday's limits back.
func attackRollback(ctx context.Context, w *world) error {
	me, err := os.Executable()
	if err != nil {
		return err
	}
	w.scope = rollbackScope
	for _, step := range []func() error{
		func() error { return w.startTPM(ctx) }, func() error { return w.startIssuer(ctx) }, func() error { return w.inventory(ctx) },
		func() error { return w.signerConfig(map[string]string{"mm-07": me}) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	// The operator is whoever runs the inkan command, which the agent is not.
	config, err := os.ReadFile(w.path("signer.yaml"))
	if err != nil {
		return err
	}
	text := strings.Replace(string(config), "    callers:", "    rollback_interval: 10ms\n    callers:", 1) + fmt.Sprintf("operators:\n  - user: \"%d\"\n    executable: %s\n", os.Getuid(), w.inkan)
	if err := w.write("signer.yaml", text); err != nil {
		return err
	}
	r := &rollback{limits: &limits{w, client.New(w.socket())}}
	if err := r.startSigner(); err != nil {
		return err
	}
	if err := r.sign(ctx); err != nil {
		return err
	}
	if err := r.halt(); err != nil {
		return err
	}
	if err := os.CopyFS(r.path("copy"), os.DirFS(r.path("state"))); err != nil {
		return err
	}
	if err := r.startSigner(); err != nil {
		return err
	}
	if err := r.sign(ctx); err != nil {
		return err
	}
	for _, step := range []func(context.Context) error{r.killed, r.restored, r.recovery, r.deleted, r.copies, r.elsewhere, r.program, r.forward, r.power, r.back} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

type rollback struct{ *limits }

// sign has one order signed, or what follows would show nothing.
func (r *rollback) sign(ctx context.Context) error {
	accepted, said, err := r.asks(ctx, order(client.NewID(), `"400"`, `"1"`))
	if err == nil && !accepted {
		err = errors.New("an order is refused that should be signed: " + said)
	}
	return err
}

func (r *rollback) tries(ctx context.Context) (bool, string, error) {
	return r.asks(ctx, order(client.NewID(), `"400"`, `"1"`))
}

// halt stops the signer in order.
func (r *rollback) halt() error {
	r.world.signer.stop()
	return nil
}

// again stops the signer, does something to its files, and starts it.
func (r *rollback) again(change func() error) error {
	if err := r.halt(); err != nil {
		return err
	}
	if err := change(); err != nil {
		return err
	}
	return r.startSigner()
}

// put puts a copy of the state in the place of another.
func (r *rollback) put(from, to string) error {
	if err := os.RemoveAll(r.path(to)); err != nil {
		return err
	}
	return os.CopyFS(r.path(to), os.DirFS(r.path(from)))
}

func (r *rollback) operator(ctx context.Context, reason string) error {
	_, err := r.run(ctx, "signer", "recover", "--socket", r.socket(), "--agent", "mm-07", "--reason", reason)
	return err
}

// killed: kill -9 of the signer is no rollback.
func (r *rollback) killed(ctx context.Context) error {
	if err := r.world.signer.cmd.Process.Kill(); err != nil {
		return err
	}
	<-r.world.signer.done
	if err := r.startSigner(); err != nil {
		return err
	}
	return r.sign(ctx)
}

func (r *rollback) restored(ctx context.Context) error {
	return r.attack("the record restored from a copy", "signer", "rollback: the record is from the counter's value", func() (bool, string, error) {
		if err := r.again(func() error { return r.put("copy", "state") }); err != nil {
			return false, "", err
		}
		return r.tries(ctx)
	})
}

func (r *rollback) recovery(ctx context.Context) error {
	if err := r.attack("the agent recovers the record itself", "signer", "caller", func() (bool, string, error) {
		err := r.signer.Recover(ctx, "mm-07", "nothing happened", new(map[string]any))
		if err == nil {
			return true, "", nil
		}
		return false, err.Error(), nil
	}); err != nil {
		return err
	}
	if err := r.operator(ctx, "the disk was replaced"); err != nil {
		return err
	}
	if err := r.attack("limits after a recovery", "signer", "max_notional_per_window: what was done before", func() (bool, string, error) { return r.tries(ctx) }); err != nil {
		return err
	}
	return r.attack("limits after a recovery and a restart", "signer", "max_notional_per_window: what was done before", func() (bool, string, error) {
		if err := r.again(func() error { return nil }); err != nil {
			return false, "", err
		}
		return r.tries(ctx)
	})
}

func (r *rollback) deleted(ctx context.Context) error {
	if err := r.attack("the record deleted", "signer", "rollback: the record is empty", func() (bool, string, error) {
		if err := r.again(func() error {
			for _, suffix := range []string{"", "-wal", "-shm", ".lock"} {
				if err := os.Remove(r.path("state", "mm-07", "log.db"+suffix)); err != nil && !errors.Is(err, os.ErrNotExist) {
					return err
				}
			}
			return nil
		}); err != nil {
			return false, "", err
		}
		return r.tries(ctx)
	}); err != nil {
		return err
	}
	return r.operator(ctx, "the record was lost")
}

// copies: what the first signs after the second has started is found at its next binding.
func (r *rollback) copies(ctx context.Context) error {
	return r.attack("two signers on copies of the state", "signer", "rollback: the TPM's counter is", func() (bool, string, error) {
		if err := r.put("state", "second"); err != nil {
			return false, "", err
		}
		config, err := os.ReadFile(r.path("signer.yaml"))
		if err != nil {
			return false, "", err
		}
		if err := r.write("second.yaml", strings.NewReplacer("run/signer.sock", "run/second.sock", "state_dir: state", "state_dir: second").Replace(string(config))); err != nil {
			return false, "", err
		}
		var ready struct{ Socket string }
		second, err := r.startReady("second", &ready, "signer", "serve", "--config", r.path("second.yaml"))
		if err != nil {
			return false, "", err
		}
		defer second.stop()
		// Limits are used up since the recovery: what is refused is recorded, and bound.
		for begun := time.Now(); ; {
			accepted, said, err := r.tries(ctx)
			if err != nil || accepted || strings.HasPrefix(said, string(scope.RuleRollback)) || time.Since(begun) > 20*time.Second {
				return accepted, said, err
			}
		}
	})
}

func (r *rollback) elsewhere(ctx context.Context) error {
	return r.attack("the state copied to another host", "TPM", "belongs to another TPM", func() (bool, string, error) {
		other, err := simulator.StartTPM(ctx, r.path("other"))
		if err != nil {
			return false, "", err
		}
		defer func() { _ = other.Kill() }() // it ends with this process anyway
		if err := r.put("state", "elsewhere"); err != nil {
			return false, "", err
		}
		config, err := os.ReadFile(r.path("signer.yaml"))
		if err != nil {
			return false, "", err
		}
		if err := r.write("elsewhere.yaml", strings.NewReplacer("tpm: "+r.tpm.Address, "tpm: "+other.Address, "run/signer.sock", "run/elsewhere.sock", "state_dir: state", "state_dir: elsewhere").Replace(string(config))); err != nil {
			return false, "", err
		}
		x, err := r.try(ctx, "", "signer", "serve", "--config", r.path("elsewhere.yaml"))
		return x.code == 0, x.stderr, err
	})
}

// program: another executable in the signer's place, which says so itself.
func (r *rollback) program(ctx context.Context) error {
	if err := r.again(func() error { return nil }); err != nil {
		return err
	}
	_ = r.operator(ctx, "the second signer is stopped") // unless the second one's own start was the last
	return r.attack("the signer's executable replaced", "signer", "rollback: the executable with the SHA-256", func() (bool, string, error) {
		b, err := os.ReadFile(r.inkan)
		if err != nil {
			return false, "", err
		}
		other := filepath.Join(r.dir, "other-signer")
		if err := os.WriteFile(other, append(b, 0), 0o700); err != nil {
			return false, "", err
		}
		if err := r.halt(); err != nil {
			return false, "", err
		}
		genuine := r.inkan
		r.inkan = other
		err = r.startSigner()
		r.inkan = genuine
		if err != nil {
			return false, "", err
		}
		return r.tries(ctx)
	})
}

// forward: the clock is set while the signer does not run, which remembers where it
// was in this boot. By how much it was does not matter; here it is less than the age of the
// certificate, since the signer is made to believe that it is earlier than it is.
func (r *rollback) forward(ctx context.Context) error {
	if err := r.attack("the clock set forward", "signer", "clock_jump: the clock was set forward by ", func() (bool, string, error) {
		if err := r.again(func() error { return r.setClock(20 * time.Second) }); err != nil {
			return false, "", err
		}
		return r.tries(ctx)
	}); err != nil {
		return err
	}
	cancel := strings.NewReplacer(`"order.new"`, `"order.cancel"`, `"OrdType":"2","Price":"61.24","OrderQty":"400","Currency":"EUR","TimeInForce":"0"`, `"OrigClOrdID":"A-991"`, `"A-991","SecurityID"`, `"A-992","SecurityID"`).Replace(order(client.NewID()))
	if accepted, said, err := r.asks(ctx, cancel); err != nil || !accepted {
		return errors.Join(fmt.Errorf("a cancel is refused that should be signed: %s", said), err)
	}
	if err := r.again(func() error { return r.setClock(-20 * time.Second) }); err != nil {
		return err
	}
	// The cancel has not carried the record along, so nothing has aged out.
	return r.attack("limits after that", "signer", "max_notional_per_window: what was done before", func() (bool, string, error) { return r.tries(ctx) })
}

// back is the last, since the record is of tomorrow then; the certificate ends in a day.
func (r *rollback) back(ctx context.Context) error {
	return r.attack("the clock set back by 23 hours", "signer", "clock_jump: the clock was set back by 23h", func() (bool, string, error) {
		if err := r.again(func() error { return r.setClock(-23 * time.Hour) }); err != nil {
			return false, "", err
		}
		return r.tries(ctx)
	})
}

// setClock stands for setting the clock of the machine, which other programs need.
func (r *rollback) setClock(by time.Duration) error {
	b, err := os.ReadFile(r.path("state", "clock.json"))
	if err != nil {
		return err
	}
	var saved struct {
		Boot   string `json:"boot"`
		Offset string `json:"offset"`
	}
	if err := json.Unmarshal(b, &saved); err != nil {
		return err
	}
	d, err := time.ParseDuration(saved.Offset)
	if err != nil {
		return err
	}
	saved.Offset = (d - by).String()
	if b, err = json.Marshal(saved); err != nil {
		return err
	}
	return os.WriteFile(r.path("state", "clock.json"), b, 0o600)
}

// power: the TPM loses power, so its counter has jumped, and an older copy of
// the record would look the same.
func (r *rollback) power(ctx context.Context) error {
	if err := r.again(func() error { return nil }); err != nil {
		return err
	}
	return r.attack("the TPM loses power, the record is a copy", "signer", "max_notional_per_window: what was done before", func() (bool, string, error) {
		if err := r.again(func() error {
			if err := r.tpm.Kill(); err != nil {
				return err
			}
			if err := r.tpm.Restart(); err != nil {
				return err
			}
			for _, pcr := range []int{0, 2, 4, 7} {
				if err := r.extend(pcr); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			return false, "", err
		}
		return r.tries(ctx)
	})
}
