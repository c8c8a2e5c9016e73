package binding_test

import (
	"net/netip"
	"testing"

	"inkan/verify"
	"inkan/verify/binding"
)

// TestPartiesHaveOneSpelling: a count that engines read in several ways is refused.
func TestPartiesHaveOneSpelling(t *testing.T) {
	v := newVenue(t)
	action := newOrder + `,"pty":{"dec":{"algo":"x7"}}`
	twice := v.signed(t, action, append(append([]string{}, session...), append(append([]string{}, order...), "453=1", "448=x7", "452=122", "453=1", "448=x7", "452=122")...)...)
	if _, err := binding.FIX(t.Context(), v.receiver, netip.Addr{}, twice, nil); reason(err) != verify.ReasonMismatch {
		t.Errorf("two groups of parties: %v", err)
	}
	for count, want := range map[string]verify.Reason{"1": "<nil>", "+1": verify.ReasonMismatch, "01": verify.ReasonMismatch, "0001": verify.ReasonMismatch} {
		m := v.signed(t, action, append(append([]string{}, session...), append(append([]string{}, order...), "453="+count, "448=x7", "447=D", "452=122")...)...)
		if _, err := binding.FIX(t.Context(), v.receiver, netip.Addr{}, m, nil); reason(err) != want {
			t.Errorf("453=%s: %v", count, err)
		}
	}
}
