package scope_test

import (
	"errors"
	"os"
	"testing"
	"time"

	"inkan/scope"
)

func TestCancelsOnly(t *testing.T) {
	text, err := os.ReadFile("../examples/scope.yaml")
	if err != nil {
		t.Fatal(err)
	}
	full, err := scope.ParseYAML(text)
	if err != nil {
		t.Fatal(err)
	}
	s, err := full.CancelsOnly()
	if err != nil {
		t.Fatal(err)
	}
	if again, err := scope.ParseCanonical(s.Canonical()); err != nil || again.Hash() != s.Hash() || s.Hash() == full.Hash() {
		t.Fatalf("it is not a scope of its own in canonical form: %v", err)
	}
	order, err := os.ReadFile("../examples/order.json")
	if err != nil {
		t.Fatal(err)
	}
	now := time.Date(2026, 7, 27, 10, 0, 0, 0, time.UTC)
	action, err := scope.ParseAction(order)
	if err != nil {
		t.Fatal(err)
	}
	if action.IsCancel() {
		t.Error("an order is a cancel")
	}
	if _, err := scope.Check(s, action, scope.Env{Now: now, AttestedAt: now}); !errors.Is(err, &scope.Refusal{Rule: scope.RuleActions}) {
		t.Errorf("an order: %v", err)
	}
	cancel, err := scope.ParseAction([]byte(`{"id":"AAECAwQFBgcICQoLDA0ODw","aud":"XPAR","act":"order.cancel","ord":{"ClOrdID":"C-1","OrigClOrdID":"A-1"}}`))
	if err != nil {
		t.Fatal(err)
	}
	if !cancel.IsCancel() {
		t.Error("a cancel is none")
	}
	if _, err := scope.Check(s, cancel, scope.Env{Now: now, AttestedAt: now}); err != nil {
		t.Errorf("a cancel: %v", err)
	}
	cancel.Audience = "XNAS"
	if _, err := scope.Check(s, cancel, scope.Env{Now: now, AttestedAt: now}); err == nil {
		t.Error("a cancel at another venue")
	}
}
