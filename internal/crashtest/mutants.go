package crashtest

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// Mutants shows that a conformance suite notices when a rule is missing. It runs
// TestMutant of this test binary in a child for each rule, which it finds in the
// environment under env, and wants each of the subtests that are given for it to
// fail. With the rule "none" nothing is missing, and all must pass.
func Mutants(t *testing.T, env string, rules map[string][]string) {
	t.Helper()
	for rule, tests := range rules {
		t.Run(rule, func(t *testing.T) {
			run := "^TestMutant$/^(" + strings.Join(tests, "|") + ")$"
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run", run, "-test.v", "-test.timeout=2m")
			cmd.Env = append(os.Environ(), env+"="+rule)
			out, err := cmd.CombinedOutput()
			if rule == "none" {
				if err != nil {
					t.Fatalf("the store that is not mutated fails: %v\n%s", err, out)
				}
				return
			}
			for _, name := range tests {
				if !strings.Contains(string(out), "--- FAIL: TestMutant/"+name) {
					t.Errorf("%s did not notice that the rule %q is missing:\n%s", name, rule, out)
				}
			}
		})
	}
}
