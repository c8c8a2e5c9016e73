package main

import (
	"strings"
	"testing"
	"time"

	"inkan/scope"
	"inkan/signer"
)

func TestPrintStatus(t *testing.T) {
	now := time.Date(2026, 7, 27, 9, 0, 0, 0, time.UTC)
	s := &signer.Status{Time: now, Agents: []signer.AgentStatus{
		{AgentInfo: signer.AgentInfo{Name: "mm-07", ID: "spiffe://example.org/agent/mm-07", NotAfter: now.Add(7*time.Hour + 30*time.Minute), Entries: 12, Utilisation: []scope.Utilisation{
			{Limit: scope.RuleNotionalWindow, Key: "EUR", Window: scope.Window{RollingS: 3600}, Used: "50000", Of: "100000"},
			{Limit: scope.RuleOrdersWindow, Window: scope.Window{DayCut: "22:00"}, Used: "0", Of: "10"},
			{Limit: scope.RuleMessagesWindow, Window: scope.Window{RollingS: 1}, Used: "9999", Of: "10000"},
			{Limit: scope.RuleOpenOrders, Used: "3", Of: "12"},
			{Limit: scope.RuleThrottle, Key: "A", Window: scope.Window{DayCut: "17:30", TZ: "Europe/Paris"}, Used: "1", Of: "5", Disabled: true},
		}}, Device: &signer.DeviceStatus{Kind: "pkcs11", WorkerPID: 7, Generation: 2, Sessions: 16, Breaker: "open", LastError: "CKR_DEVICE_ERROR"}},
		{AgentInfo: signer.AgentInfo{Name: "x"}, Error: "no certificate"},
	}}
	var b strings.Builder
	printStatus(&b, s)
	for _, want := range []string{
		"mm-07  spiffe://example.org/agent/mm-07\n", "(7h30m0s left)", "breaker open", "last: CKR_DEVICE_ERROR",
		"max_notional_per_window EUR, any 1h                           [############............]  50 %  50000 of 100000\n",
		"max_orders_per_window, the day from 22:00 UTC                 [........................]   0 %  0 of 10\n",
		"[#######################.]  99 %  9999 of 10000\n", // not quite full
		"max_open_orders, now ", "[######..................]  25 %  3 of 12\n",
		"repeat_execution_throttle A, the day from 17:30 Europe/Paris", "[########################] 100 %  1 of 5  DISABLED until it is re-armed\n",
		"SIGNS NOTHING: no certificate\n",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in:\n%s", want, b.String())
		}
	}
}
