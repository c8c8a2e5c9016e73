package scope

import (
	"os"
	"testing"
	"time"
)

func TestExamples(t *testing.T) {
	y, err := os.ReadFile("../examples/scope.yaml")
	if err != nil {
		t.Fatal(err)
	}
	s, err := ParseYAML(y)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseCanonical(s.Canonical()); err != nil {
		t.Fatal(err)
	}
	j, err := os.ReadFile("../examples/order.json")
	if err != nil {
		t.Fatal(err)
	}
	a, err := ParseAction(j)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	p, err := Check(s, a, Env{Now: now, AttestedAt: now})
	if err != nil {
		t.Fatal(err)
	}
	n, c, ok := p.Notional()
	if n.String() != "24496" || c != "EUR" || !ok {
		t.Errorf("notional = %v %v", n, c)
	}
}

func BenchmarkCheck(b *testing.B) {
	y, _ := os.ReadFile("../examples/scope.yaml")
	s, err := ParseYAML(y)
	if err != nil {
		b.Fatal(err)
	}
	j, _ := os.ReadFile("../examples/order.json")
	a, err := ParseAction(j)
	if err != nil {
		b.Fatal(err)
	}
	now := time.Now()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Check(s, a, Env{Now: now, AttestedAt: now}); err != nil {
			b.Fatal(err)
		}
	}
}
