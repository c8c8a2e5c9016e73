package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"

	"inkan/internal/problem"
)

// call runs the command as main does.
func call(stdin string, args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	code = run(context.Background(), append([]string{"inkan"}, args...), &env{stdin: strings.NewReader(stdin), stdout: &out, stderr: &errs})
	return code, out.String(), errs.String()
}

func TestUsage(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"nonsense"}, "unknown command"},
		{[]string{"scope", "nonsense"}, "unknown command"},
		{[]string{"scope", "check", "file"}, "takes flags only"},
		{[]string{"scope", "check"}, "--scope is missing"},
		{[]string{"scope", "check", "--nonsense"}, "flag provided but not defined"},
		{[]string{"sign"}, "--action is missing"},
		{[]string{"verify", "--ca", "x", "--jws", "y"}, "--audience is missing"},
		{[]string{"verify", "--ca", "../../examples/order.json", "--jws", "y", "--audience", "XPAR", "--crl", "a", "--no-revocation"}, ""},
		{[]string{"tpm", "pcrs", "--pcr", "sha256"}, "is an example"},
		{[]string{"tpm", "pcrs", "--pcr", "sha256:16"}, "can be reset"},
		{[]string{"issuer", "device", "add"}, "--id is missing"},
		{[]string{"rearm", "sign", "--entry", "1", "--reason", "r", "--agent", "mm-07", "--key", "file:none"}, "a SPIFFE ID is expected"},
	} {
		code, out, errs := call("", c.args...)
		if c.want == "" {
			if code == 0 {
				t.Errorf("%v: exit code 0", c.args)
			}
			continue
		}
		if code != exitUsage || !strings.Contains(errs, c.want) || out != "" {
			t.Errorf("%v: exit code %d, stderr %q, stdout %q; want 2 and %q", c.args, code, errs, out, c.want)
		}
	}
}

// TestFailsInJSON: a command that was given --json prints one JSON document, also
// when it fails, and says on standard error what it always says there.
func TestFailsInJSON(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		args string
		code int
		want string
	}{
		{"sign --socket " + dir + "/none --action ../../examples/order.json", exitError, dir + "/none"},
		{"sign --action none.json", exitError, "none.json"},
		{"status --socket " + dir + "/none", exitError, "is it running"},
		{"sign", exitUsage, "--action is missing"},
		{"status extra", exitUsage, "takes flags only"},
		{"scope check --scope ../../examples/order.json", exitError, "unknown member"},
		{"audit verify --log none.db --ca ../../examples/order.json", exitError, ""},
		{"verify --ca none.pem --audience XPAR --jws none --no-revocation", exitError, "none.pem"},
		{"tpm info --tpm " + dir + "/none", exitError, "there is no TPM"},
		{"issuer agent list --dir " + dir, exitError, "has no issuer"},
	} {
		code, out, errs := call("", strings.Fields(strings.Replace(c.args, " extra", " --json extra", 1)+" --json")...)
		var f failure
		if err := json.Unmarshal([]byte(out), &f); err != nil {
			t.Errorf("%s: %v: %s", c.args, err, out)
			continue
		}
		if code != c.code || f.ExitCode != code || !strings.Contains(f.Error, c.want) || errs != "inkan: "+f.Error+"\n" {
			t.Errorf("%s: exit code %d: %s, %s", c.args, code, out, errs)
		}
	}
	// A rule is a member of its own.
	p := &problem.Problem{Status: 403, Rule: "max_order_qty", Detail: "too much", Left: "0"}
	var document bytes.Buffer
	e := &env{stdout: &document, stderr: io.Discard, asJSON: true}
	if code := e.fail(withCode(exitRefused, p)); code != exitRefused {
		t.Errorf("exit code %d", code)
	}
	var f failure
	if err := json.Unmarshal(document.Bytes(), &f); err != nil || f.Rule != p.Rule || f.Problem == nil || f.Problem.Left != "0" || f.Error != "max_order_qty: too much" {
		t.Errorf("%s, %v", document.Bytes(), err)
	}
}

// TestEveryCommandHasHelp: each command says what it does, and its help works.
func TestEveryCommandHasHelp(t *testing.T) {
	var walk func(path []string, list []*cli.Command)
	walk = func(path []string, list []*cli.Command) {
		for _, c := range list {
			p := append(append([]string(nil), path...), c.Name)
			if c.Usage == "" {
				t.Errorf("%v has no usage", p)
			}
			if code, out, errs := call("", append(p, "--help")...); code != 0 || !strings.Contains(out, c.Usage) {
				t.Errorf("%v --help: exit code %d: %s%s", p, code, out, errs)
			}
			walk(p, c.Subcommands)
		}
	}
	walk(nil, commands(&env{}))
}

func TestScopeCommands(t *testing.T) {
	code, out, errs := call("", "scope", "check", "--scope", "../../examples/scope.yaml", "--action", "../../examples/order.json", "--json")
	if code != 0 || !strings.Contains(out, `"decision":"permit"`) || !strings.Contains(out, `"notional":"24496"`) {
		t.Errorf("exit code %d: %s%s", code, out, errs)
	}
	b, err := os.ReadFile("../../examples/order.json")
	if err != nil {
		t.Fatal(err)
	}
	big := filepath.Join(t.TempDir(), "big.json")
	if err := os.WriteFile(big, bytes.Replace(b, []byte(`"400"`), []byte(`"5000"`), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	code, out, errs = call("", "scope", "explain", "--scope", "../../examples/scope.yaml", "--action", big)
	if code != exitRefused || !strings.Contains(out, "max_order_qty: the quantity is 5000, at most 1000 is allowed: 4000 too much") || !strings.Contains(out, "max_order_notional: ") {
		t.Errorf("exit code %d: %s%s", code, out, errs)
	}
	// What was done before decides: a history, or a record.
	limited := filepath.Join(t.TempDir(), "limited.yaml")
	y, err := os.ReadFile("../../examples/scope.yaml")
	if err != nil {
		t.Fatal(err)
	}
	y = append(y, "\nmax_notional_per_window: [{currency: EUR, amount: \"30000\", window: {rolling_s: 60}}]\nmax_open_orders: {count: 1}\n"...)
	if err := os.WriteFile(limited, y, 0o600); err != nil {
		t.Fatal(err)
	}
	history := filepath.Join(t.TempDir(), "history.json")
	if err := os.WriteFile(history, fmt.Appendf(nil, `{"steps":[{"at":"2026-07-27T09:30:00.000000Z","action":%s,"reference":{"instrument":"isin:FR0000120271","price":"61.24","currency":"EUR","source":"XPAR","time":"2026-07-27T09:30:00Z"}}]}`, b), 0o600); err != nil {
		t.Fatal(err)
	}
	explain := []string{"scope", "explain", "--scope", limited, "--action", "../../examples/order.json", "--at", "2026-07-27T09:30:59.999999Z", "--history", history}
	code, out, errs = call("", explain...)
	if code != exitRefused || !strings.Contains(out, "max_notional_per_window: the sum of EUR in any 1m is 48992, at most 30000 is allowed: 24496 is used, 5504 is left") || !strings.Contains(out, "max_open_orders: 2 orders are open, at most 1 are allowed") {
		t.Errorf("exit code %d: %s%s", code, out, errs)
	}
	explain[7] = "2026-07-27T09:31:00Z"
	if code, out, _ = call("", explain...); code != exitRefused || strings.Contains(out, "max_notional_per_window") || !strings.Contains(out, "max_open_orders") {
		t.Errorf("a minute later: exit code %d: %s", code, out)
	}
	if code, _, errs = call("", append(explain, "--log", history)...); code != exitUsage || !strings.Contains(errs, "one of them") {
		t.Errorf("exit code %d: %s", code, errs)
	}
	code, out, _ = call("", "scope", "explain", "--scope", "../../examples/scope.yaml")
	if code != 0 || !strings.Contains(out, "An order is worth at most 25000 EUR.") {
		t.Errorf("exit code %d: %s", code, out)
	}
	code, out, _ = call("", "scope", "canonical", "--scope", "../../examples/scope.yaml")
	if code != 0 || !json.Valid([]byte(out)) {
		t.Errorf("exit code %d: %s", code, out)
	}
	code, _, _ = call("", "scope", "contains", "--scope", "../../examples/scope.yaml", "--inner", "../../examples/scope.yaml")
	if code != 0 {
		t.Errorf("a scope does not contain itself: exit code %d", code)
	}
	for _, of := range []string{"scope", "action", "statement"} {
		if code, out, _ := call("", "scope", "schema", "--of", of); code != 0 || !json.Valid([]byte(out)) {
			t.Errorf("schema of %s: exit code %d", of, code)
		}
	}
}

// TestSecretsStayOut: no flag takes a secret.
func TestSecretsStayOut(t *testing.T) {
	var walk func(list []*cli.Command)
	walk = func(list []*cli.Command) {
		for _, c := range list {
			for _, f := range c.Flags {
				for _, n := range f.Names() {
					for _, bad := range []string{"pin", "password", "secret", "auth"} {
						if n == bad {
							t.Errorf("%s --%s would show in a process listing", c.Name, n)
						}
					}
				}
			}
			walk(c.Subcommands)
		}
	}
	walk(commands(&env{}))
}
