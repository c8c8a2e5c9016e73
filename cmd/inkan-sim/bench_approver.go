package main

import (
	"context"
	"crypto"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/go-tpm/tpm2"

	"inkan/signer/client"
	"inkan/tpm"
)

// tpmCounter stands between a program and a TPM's socket and counts commands.
type tpmCounter struct {
	address string // where it listens
	tpm     string
	l       net.Listener

	mu       sync.Mutex
	commands map[tpm2.TPMCC]int
}

func countTPM(address, to string) (*tpmCounter, error) {
	l, err := net.Listen("unix", address)
	if err != nil {
		return nil, err
	}
	c := &tpmCounter{address: address, tpm: to, l: l, commands: make(map[tpm2.TPMCC]int)}
	go func() {
		for {
			from, err := l.Accept()
			if err != nil {
				return // it was closed
			}
			c.serve(from) // one at a time, as swtpm does
		}
	}()
	return c, nil
}

func (c *tpmCounter) serve(from net.Conn) {
	defer from.Close()
	to, err := net.Dial("unix", c.tpm)
	if err != nil {
		return // the program sees that its connection ends
	}
	defer to.Close()
	for {
		command, err := message(from)
		if err != nil {
			return
		}
		c.mu.Lock()
		c.commands[tpm2.TPMCC(binary.BigEndian.Uint32(command[6:]))]++
		c.mu.Unlock()
		if _, err := to.Write(command); err != nil {
			return
		}
		answer, err := message(to)
		if err != nil {
			return
		}
		if _, err := from.Write(answer); err != nil {
			return
		}
	}
}

// message reads one command or answer: both have their size after the tag.
func message(r io.Reader) ([]byte, error) {
	head := make([]byte, 10)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(head[2:])
	if size < 10 || size > 8<<10 {
		return nil, fmt.Errorf("a message of %d bytes", size)
	}
	b := make([]byte, size)
	copy(b, head)
	_, err := io.ReadFull(r, b[10:])
	return b, err
}

// take returns how many commands of each kind there were since the last call.
func (c *tpmCounter) take() (map[tpm2.TPMCC]int, int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	out, n := c.commands, 0
	for _, x := range out {
		n += x
	}
	c.commands = make(map[tpm2.TPMCC]int)
	return out, n
}

// approver measures one signature in each mode, an approver on the same machine
// included, and counts the commands that go to the TPM.
func (b *bench) approver(ctx context.Context) error {
	var raw *measurement
	for _, mode := range []struct {
		name             string
		approver, epochs bool
	}{{"local mode", false, false}, {"approver mode, over loopback", true, false}, {"approver mode with epochs", true, true}} {
		if err := func() error {
			w, err := newWorld(b.out, b.inkan, true)
			if err != nil {
				return err
			}
			defer w.end()
			w.withApprover, w.withoutEpochs = mode.approver, !mode.epochs
			me, err := os.Executable()
			if err != nil {
				return err
			}
			w.caller = me
			if err := w.bringUp(ctx); err != nil {
				return err
			}
			if raw == nil {
				w.signer.stop()
				if raw, err = b.rawAlone(w); err != nil {
					return err
				}
				if err := w.startSigner(); err != nil {
					return err
				}
			}
			return b.mode(ctx, w, mode.name, raw)
		}(); err != nil {
			return fmt.Errorf("%s: %w", mode.name, err)
		}
	}
	return nil
}

// rawAlone is TPM2_Sign with a key that has no policy.
func (b *bench) rawAlone(w *world) (*measurement, error) {
	d, err := tpm.Open(w.tpm.Address)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	file, _, err := d.CreateKey(tpm.SigningTemplate())
	if err != nil {
		return nil, err
	}
	k, err := d.LoadKey(file, nil)
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256([]byte("raw"))
	return b.run("TPM2_Sign alone", 1, nil, func(int) error {
		_, err := k.Sign(nil, digest[:], crypto.SHA256)
		return err
	})
}

// mode measures orders through the signer's socket, then counts commands with
// the counter between signer and TPM.
func (b *bench) mode(ctx context.Context, w *world, name string, raw *measurement) error {
	c := client.New(w.socket())
	sign := func(int) error {
		_, err := c.SignJSON(ctx, []byte(order(client.NewID())))
		return err
	}
	for _, clients := range []int{1, 4} {
		if _, err := b.run(name, clients, raw, sign); err != nil {
			return err
		}
	}
	w.signer.stop()
	counter, err := countTPM(w.path("counted"), w.tpm.Address)
	if err != nil {
		return err
	}
	defer counter.l.Close()
	address := w.tpm.Address
	w.tpm.Address = counter.address
	defer func() { w.tpm.Address = address }()
	if err := w.restartSigner(); err != nil {
		return err
	}
	for range 20 { // what is loaded once is loaded
		if err := sign(0); err != nil {
			return err
		}
	}
	counter.take()
	const n = 400
	before := w.cpu()
	for range n {
		if err := sign(0); err != nil {
			return err
		}
	}
	kinds, all := counter.take()
	var work []string
	for process, t := range w.cpu() {
		if t -= before[process]; t > 0 {
			work = append(work, fmt.Sprintf("%s %s", process, (t/n).Round(10*time.Microsecond)))
		}
	}
	slices.Sort(work)
	b.notes = append(b.notes, fmt.Sprintf("%s: %.2f TPM commands a signature; processor time a signature: %s; %s", name, float64(all)/n, strings.Join(work, ", "), commandNames(kinds)))
	return nil
}

// commandNames counts commands by their names in the specification.
func commandNames(kinds map[tpm2.TPMCC]int) string {
	names := map[tpm2.TPMCC]string{tpm2.TPMCCSign: "Sign", tpm2.TPMCCPolicyPCR: "PolicyPCR", tpm2.TPMCCPolicySigned: "PolicySigned", tpm2.TPMCCPolicyAuthorize: "PolicyAuthorize", tpm2.TPMCCPolicyNV: "PolicyNV",
		tpm2.TPMCCNVRead: "NV_Read", tpm2.TPMCCNVReadPublic: "NV_ReadPublic", tpm2.TPMCCNVIncrement: "NV_Increment"}
	var out []string
	for c, n := range kinds {
		name := names[c]
		if name == "" {
			name = fmt.Sprintf("%#x", uint32(c))
		}
		out = append(out, fmt.Sprintf("%s %d", name, n))
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

// cpu is the processor time that each process of the world has used, in user
// and system mode: unlike latency it does not depend on what else the machine does.
func (w *world) cpu() map[string]time.Duration {
	out := make(map[string]time.Duration)
	pids := map[string]int{"TPM": w.tpm.PID()}
	for _, p := range w.procs { // the one that was started last counts
		pids[p.name] = p.cmd.Process.Pid
	}
	for name, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue // it has ended
		}
		_, rest, _ := strings.Cut(string(b), ") ")
		fields := strings.Fields(rest)
		if len(fields) < 13 {
			continue
		}
		for _, f := range fields[11:13] { // utime and stime, in hundredths of a second
			ticks, err := strconv.Atoi(f)
			if err == nil {
				out[name] += time.Duration(ticks) * 10 * time.Millisecond
			}
		}
	}
	return out
}
