package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

// demo runs the main job as separate processes and then attacks it. Steps tell
// a person what happens; attacks say who refused, and by which check.
type demo struct {
	inkan string // the command under demonstration
	dir   string // everything the demo writes
	out   io.Writer
	quiet bool   // no narration: the result goes out as JSON
	layer string // of the attacks that follow; empty in the demo
	rows  []row
	procs []*process
}

// row is the outcome of one attack.
type row struct {
	Layer   string `json:"layer,omitempty"`
	Attack  string `json:"attack"`
	Refused bool   `json:"refused"`
	By      string `json:"by"`     // who should refuse
	Check   string `json:"check"`  // the stable name that must appear
	Detail  string `json:"detail"` // what was said
}

func (d *demo) say(format string, a ...any) {
	if !d.quiet {
		fmt.Fprintf(d.out, format+"\n", a...)
	}
}

func (d *demo) title(format string, a ...any) { d.say("\n== "+format, a...) }

func (d *demo) path(name ...string) string { return filepath.Join(append([]string{d.dir}, name...)...) }

// result of a finished command.
type result struct {
	code           int
	stdout, stderr string
}

// try runs the inkan command and returns however it ended.
func (d *demo) try(ctx context.Context, stdin string, args ...string) (result, error) {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	return runCommand(ctx, stdin, d.inkan, args...)
}

func runCommand(ctx context.Context, stdin, name string, args ...string) (result, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	r := result{stdout: out.String(), stderr: errs.String()}
	if x, ok := errors.AsType[*exec.ExitError](err); ok {
		r.code = x.ExitCode()
		return r, nil
	}
	return r, err
}

// inkanCommand runs a step that must succeed, shows it as typed, and returns its output.
func (d *demo) run(ctx context.Context, args ...string) (string, error) {
	d.say("   $ inkan %s", d.short(strings.Join(args, " ")))
	r, err := d.try(ctx, "", args...)
	if err != nil {
		return "", err
	}
	if r.code != 0 {
		return "", fmt.Errorf("inkan %s: exit code %d: %s", strings.Join(args, " "), r.code, strings.TrimSpace(r.stderr))
	}
	return r.stdout, nil
}

// short leaves the demo's own directory out of what is shown.
func (d *demo) short(s string) string { return strings.ReplaceAll(s, d.dir+"/", "") }

// process is a daemon of the demo.
type process struct {
	cmd    *exec.Cmd
	name   string
	stderr *os.File
	done   chan struct{}
}

// start starts a daemon; its standard error goes to a file that a failure shows.
func (d *demo) start(name string, stdout io.Writer, command string, args ...string) (*process, error) {
	log, err := os.Create(d.path(name + ".log"))
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(command, args...)
	cmd.Stdout, cmd.Stderr = stdout, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	d.say("   $ %s %s &", filepath.Base(command), d.short(strings.Join(args, " ")))
	if err := cmd.Start(); err != nil {
		_ = log.Close()
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	p := &process{cmd: cmd, name: name, stderr: log, done: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // how it ended shows in its log
		close(p.done)
	}()
	d.procs = append(d.procs, p)
	return p, nil
}

// stop asks a daemon to end and waits for it.
func (p *process) stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(10 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
	_ = p.stderr.Close()
}

// close ends all daemons, the last started first.
func (d *demo) close() {
	for i := len(d.procs) - 1; i >= 0; i-- {
		d.procs[i].stop()
	}
	d.procs = nil
}

// attack runs one attack. do returns everything that the refusing party said,
// and an error only if the attack could not be carried out. The attack counts
// as refused if accepted is false and the party named the check.
func (d *demo) attack(name, by, check string, do func() (accepted bool, said string, err error)) error {
	accepted, said, err := do()
	if err != nil {
		return fmt.Errorf("attack %q could not be carried out: %w", name, err)
	}
	said = strings.Join(strings.Fields(said), " ")
	r := row{Layer: d.layer, Attack: name, By: by, Check: check, Detail: d.short(said), Refused: !accepted && strings.Contains(said, check)}
	d.rows = append(d.rows, r)
	mark := "refused"
	if !r.Refused {
		mark = "NOT REFUSED AS EXPECTED"
	}
	d.say("   %-34s %s by the %s: %s", name, mark, by, clip(r.Detail, 150))
	return nil
}

func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return s[:n-3] + "..."
}

// finish prints the table and fails unless all attacks were refused.
func (d *demo) finish() error {
	bad := 0
	for _, r := range d.rows {
		if !r.Refused {
			bad++
		}
	}
	if d.quiet {
		b, err := json.MarshalIndent(map[string]any{"attacks": d.rows, "not_refused": bad}, "", "  ")
		if err != nil {
			return err
		}
		fmt.Fprintf(d.out, "%s\n", b)
	} else {
		d.title("Attacks")
		w := tabwriter.NewWriter(d.out, 0, 0, 2, ' ', 0)
		fmt.Fprintln(w, "   attack\trefused\tby\tcheck\tlayer")
		for _, r := range d.rows {
			fmt.Fprintf(w, "   %s\t%v\t%s\t%s\t%s\n", r.Attack, r.Refused, r.By, r.Check, r.Layer)
		}
		if err := w.Flush(); err != nil {
			return err
		}
	}
	if bad > 0 {
		return fmt.Errorf("%d of %d attacks were not refused as expected", bad, len(d.rows))
	}
	d.say("\n%d attacks, all refused.", len(d.rows))
	return nil
}
