package audit_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"inkan/audit"
	"inkan/scope"
)

// TestControlsInTheRecord: policies and overrides stand in the record, and
// verification decides anew what they allow.
func TestControlsInTheRecord(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*scope.Statement)
		rule   audit.Rule
	}{
		"as it is":             {nil, ""},
		"without its policy":   {func(s *scope.Statement) { s.Decision.Policy = nil }, audit.RuleUtilisation},
		"another policy":       {func(s *scope.Statement) { s.Decision.Policy[0]++ }, audit.RuleUtilisation},
		"without its override": {func(s *scope.Statement) { s.Authorized = nil }, audit.RuleScope},
	} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		text, err := scope.ControllerKey(&key.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		soft := strings.Replace(scopeJSON, `"amount":"25000"`, `"amount":"25000","block":"soft"`, 1)
		d := newDeskWith(t, strings.Replace(soft, `"max_order_notional"`, fmt.Sprintf(`"controllers":[{"key":%q,"may":["override","policy"],"name":"risk"}],"max_order_notional"`, text), 1))
		now := time.Now().UTC().Truncate(time.Second)
		narrow, err := scope.Parse([]byte(strings.Replace(soft, `"25000"`, `"4000"`, 1)))
		if err != nil {
			t.Fatal(err)
		}
		policy, err := scope.SignPolicy(key, d.agent.ID, 1, narrow, now, now.Add(time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		e, err := scope.NewEvent(scope.EventPolicy, policy, d.scope)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.log.Event(t.Context(), e, d.id); err != nil {
			t.Fatal(err)
		}
		a := action(1, "501") // 25,050: too much for the policy, and for the certificate
		override, err := scope.SignAuthorization(key, d.agent.ID, a, scope.RuleOrderNotional, "client is waiting", now, now.Add(time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		p, err := scope.Check(d.scope, a, scope.Env{Now: time.Now(), AttestedAt: time.Now(), Agent: d.agent.ID, Authorizations: []string{override}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.log.Record(t.Context(), p, d.id); err != nil {
			t.Fatal(err)
		}
		if c.change == nil {
			d.seal(t)
			if export := d.export(t, audit.ExportOptions{}); !bytes.Contains(export, []byte(`"policy_sha256":"`)) || !bytes.Contains(export, []byte(`"authorizations":"`+override+`"`)) {
				t.Error("the export has not the policy, or not the override")
			} else if _, err := d.verifyExport(export); err != nil {
				t.Error(err)
			}
		}
		if err := d.log.Close(); err != nil {
			t.Fatal(err)
		}
		if c.change != nil {
			d.rewrite(t, 2, c.change)
		}
		_, err = d.verify(t)
		u, ok := errors.AsType[*audit.Unproven](err)
		if c.rule == "" && err != nil || c.rule != "" && (!ok || u.Rule != c.rule) {
			t.Errorf("%s: %v, %q is expected", name, err, c.rule)
		}
	}
}
