-- KEYS: counter, keys; ARGV: owner. Returns 1, or 0 where one is held by another owner.
local result = 1
for i = 2, #KEYS do
	local v = redis.call('GET', KEYS[i])
	if v then
		local p = string.find(v, '[ +]')
		if string.sub(v, p + 1) == ARGV[1] then
			redis.call('DEL', KEYS[i])
			if string.sub(v, p, p) == '+' then
				redis.call('PUBLISH', KEYS[i], '')
			end
		else
			result = 0
		end
	end
end
return result
